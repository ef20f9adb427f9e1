"""What is left of a change after rounding: figures whose values are known beforehand."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from lora_edge.errors import DataError
from lora_edge.files.schema import decode
from lora_edge.maths.quantization import Blocks, quantize
from lora_edge.maths.survival import Effect, LayerSurvival, Survival, effect


def _blocks(codes: np.ndarray, width: int) -> Blocks:
    scales = np.ones(codes.shape[:2], np.float32)
    return Blocks(codes.astype(np.uint8), scales, None, width, 4)


def test_codes_are_counted_without_what_fills_the_last_block() -> None:
    before = np.full((2, 2, 4), 8)
    after = before.copy()
    after[0, 0, 1] = 9  # one of 2 x 6 weights
    after[1, 1, 3] = 15  # padding: the weight has 6 inputs
    weight = np.zeros((2, 6), np.float32)
    changed = weight.copy()
    changed[0, 1] = 0.5
    found = LayerSurvival.of(_blocks(before, 6), _blocks(after, 6), weight, changed)
    assert found is not None
    assert found.codes == pytest.approx(1 / 12)
    assert found.cosine == pytest.approx(1)  # the same direction
    assert found.error == pytest.approx(1)  # and twice its size


def test_a_change_below_the_step_is_lost() -> None:
    weight = np.tile(np.arange(-8, 8, dtype=np.float32), (3, 2))
    changed = weight + np.float32(0.3) * (np.abs(weight) < 7)
    blocks = [quantize(x, 4) for x in (weight, changed)]
    found = LayerSurvival.of(blocks[0], blocks[1], weight, changed)
    assert found == LayerSurvival(codes=0.0, cosine=0.0, error=1.0)
    whole = weight + 1.0 * (np.abs(weight) < 7)  # the control: a step is kept as it is
    kept = LayerSurvival.of(blocks[0], quantize(whole, 4), weight, whole)
    assert kept is not None
    assert kept.codes == pytest.approx(13 / 16)
    assert kept.cosine == pytest.approx(1)
    assert kept.error == pytest.approx(0, abs=1e-6)


def test_a_layer_that_does_not_change_has_nothing_to_keep() -> None:
    weight = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    blocks = quantize(weight, 4)
    assert LayerSurvival.of(blocks, blocks, weight, weight) is None


@pytest.mark.parametrize(
    ("realised", "gain", "cosine", "retained"),
    [
        ([[3.0, 4.0], [0.0, 0.0]], 1.0, 1.0, 1.0),
        ([[1.5, 2.0], [0.0, 0.0]], 0.5, 1.0, 0.5),
        ([[3.75, 5.0], [0.0, 0.0]], 1.25, 1.0, 0.75),  # too much is no better than too little
        ([[3.0, 4.0], [4.0, 3.0]], 1.0, 0.5**0.5, 0.5**0.5),  # drowned: all there, and as much else
        ([[-3.0, -4.0], [0.0, 0.0]], -1.0, -1.0, -1.0),
        ([[0.0, 0.0], [0.0, 0.0]], 0.0, 0.0, 0.0),
    ],
)
def test_effect(realised: list[list[float]], gain: float, cosine: float, retained: float) -> None:
    intended = [np.array([3.0, 4.0]), np.array([0.0, 0.0])]
    rows = [np.array(row) for row in realised]
    found = effect(rows, intended)
    assert found is not None
    assert found.gain == pytest.approx(gain)
    assert found.cosine == pytest.approx(cosine)
    assert found.retained == pytest.approx(retained)
    off = np.linalg.norm(np.concatenate(rows) - np.concatenate(intended)) / 5
    assert found.error == pytest.approx(off)


def test_no_effect_is_no_figure() -> None:
    assert effect([np.ones(2)], [np.zeros(2)]) is None


def test_the_line_and_the_file_say_the_same() -> None:
    layers = {"a": LayerSurvival(0.25, 0.5, 2.0), "b": LayerSurvival(0.75, 0.7, 1.0)}
    made = Survival("auto", 0.9, Effect(1.06, 0.97, 0.2), layers, {"a": 8, "c": 32})
    said = made.line()
    for words in ("94.0%", "50.0% of the codes", "0.600 in the mean", "0.500 at worst"):
        assert words in said
    assert "1 layers at 8 bits, 1 in fp32" in said
    data = json.loads(json.dumps(asdict(made)))
    assert decode(Survival, data, "it", DataError, "") == made
    data["layers"]["a"]["codes"] = 1.5
    with pytest.raises(DataError, match="codes"):
        decode(Survival, data, "it", DataError, "")
