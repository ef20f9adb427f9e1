"""What a row is to PyTorch, and which probes a kind of model can run; no model is needed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lora_edge.bundle.part import Beginning, Cache, Part
from lora_edge.errors import DataError
from lora_edge.names import NONE_ADAPTER
from lora_edge.parity.plan.states import BASE, Probe, only
from lora_edge.parity.subjects import of_parts
from lora_edge.parity.subjects.encoder import by_position
from lora_edge.parity.subjects.encoder_decoder import EncoderDecoderSubject
from lora_edge.parity.subjects.subject import LARGE, Measuring, continued

TEXT = ("input_ids", "attention_mask", "token_type_ids")


def _part(*inputs: str, output: Any = "logits", **facts: Any) -> Part:
    return Part("onnx/x.onnx", "portable", "trace", inputs, output, 50, 20, **facts)


DECODER = of_parts({"decoder": _part(*TEXT[:2], cache=Cache("shared", 1, 1, 8))}, None)
ENCODER = of_parts({"encoder": _part(*TEXT)}, None)
IMAGES = of_parts({"encoder": _part("pixel_values", sample=(3, 4, 6))}, None)
READS, GIVES = _part(*TEXT[:2], output="last_hidden_state"), _part("input_ids")
ANSWERS = of_parts({"encoder": READS, "decoder": GIVES}, Beginning((7, 8)))
HEARD = _part("input_features", output="last_hidden_state", sample=(5, 9))
SPEECH = of_parts({"encoder": HEARD, "decoder": GIVES}, Beginning((7,)))


def test_which_part_reads_and_which_gives() -> None:
    assert DECODER.reads is DECODER.gives
    assert (ANSWERS.reads, ANSWERS.gives) == (READS, GIVES)
    kinds = [(x.behind, x.headed, x.layered) for x in (DECODER, ENCODER, ANSWERS)]
    assert kinds == [(True, False, True), (False, True, True), (False, False, False)]
    known = [x.known for x in (DECODER, ENCODER, IMAGES, ANSWERS, SPEECH)]
    sizes = ("vocab_size", "max_length")
    assert known == [sizes, (*sizes, "pad_token_id"), (), (), ()]


def test_what_a_row_is() -> None:
    assert DECODER.inputs((3, 4), (5,))["input_ids"].tolist() == [3, 4, 5]
    row = ENCODER.inputs((3, 4, 9))
    assert {name: x.tolist() for name, x in row.items()} == {
        "input_ids": [3, 4, 9], "attention_mask": [1, 1, 1], "token_type_ids": [0, 0, 1]
    }  # fmt: skip
    pixels = IMAGES.inputs((11,))["pixel_values"]
    assert (pixels.shape, pixels.dtype) == ((3, 4, 6), np.float32)
    np.testing.assert_array_equal(pixels, IMAGES.inputs((11,))["pixel_values"])
    assert (pixels != IMAGES.inputs((12,))["pixel_values"]).all()


@pytest.mark.parametrize("subject", [ANSWERS, SPEECH])
def test_what_a_decoder_begins_with_follows_from_the_row(subject: EncoderDecoderSubject) -> None:
    found = [subject.begun((seed,)) for seed in range(20)]
    assert found == [subject.begun((seed,)) for seed in range(20)]
    assert len(set(found)) == 20
    assert {row[0] for row in found} == {7}
    assert {len(row) for row in found} <= set(range(2, 7))
    row = subject.inputs((3,), (1, 2))
    assert row["decoder_input_ids"].tolist() == [*subject.begun((3,)), 1, 2]
    source = row.get("input_ids", row.get("input_features"))
    assert source is not None
    assert source.shape == ((1,) if subject is ANSWERS else (5, 9))


def _bundle(mode: str, *, headed: bool, labels: tuple[str, ...]) -> Any:
    sites = {"classifier": SimpleNamespace(parts=("W", "c") if headed else ("A", "B"))}
    entries = {NONE_ADAPTER: SimpleNamespace(labels=labels)}
    manifest = SimpleNamespace(mode=mode, sites=sites)
    return SimpleNamespace(manifest=manifest, adapter=entries.__getitem__)


def test_a_base_without_a_head_of_its_own_is_not_asked() -> None:
    mixed = Probe("mixed", "mixed", ((1,), (2,), (3,)), (only("a"), BASE, only("b")), 4)
    base = Probe("base", "base", ((1,),), (BASE,), 4)
    lacks = _bundle("switchable", headed=True, labels=())
    kept = ENCODER.prepared(mixed, lacks)
    assert kept is not None
    assert (kept.rows, kept.states, kept.steps) == (((1,), (3,)), (only("a"), only("b")), 0)
    assert ENCODER.prepared(base, lacks) is None
    for bundle in (
        _bundle("switchable", headed=True, labels=("x", "y")),
        _bundle("switchable", headed=False, labels=()),
        _bundle("merged", headed=True, labels=()),
    ):
        found = ENCODER.prepared(base, bundle)
        assert found is not None
        assert (found.rows, found.steps) == (base.rows, 0)
    assert DECODER.prepared(base, lacks) is base


def test_what_an_effect_is_measured_against() -> None:
    """The base; where there may be a new head, that head without the low-rank part."""
    asked: list[Any] = []
    reference: Any = SimpleNamespace(outputs=lambda *given, **more: asked.append((*given, more)))
    rows = [DECODER.inputs((1,))] * 2
    for subject in (DECODER, ANSWERS, ENCODER):
        subject.without(reference, rows, [only("a"), only("b")])
    base = (rows, [BASE, BASE], {})
    assert asked == [base, base, (rows, [only("a"), only("b")], {"low_rank": False})]


def test_how_often_noise_is_measured() -> None:
    """Where a row has few outputs, with every probe; where it has many, once and on few rows."""
    short = Probe("base", "base", ((1,), (2,)), (BASE, BASE), 4)
    crowd = Probe("crowd", "blend", ((1,), (2,)), (BASE, BASE), 4, part="crowd")
    long = Probe("long", "base", ((1,) * 200,), (BASE,), 4)
    for probe in (short, crowd, long):
        tails = [()] * len(probe.rows)
        for subject in (ENCODER, ANSWERS):
            assert subject.measuring(probe, tails, LARGE + 1) == Measuring()
    found = [
        DECODER.measuring(probe, [()] * len(probe.rows), size)
        for probe in (short, crowd, long)
        for size in (LARGE, LARGE + 1)
    ]
    assert Measuring() == (True, None, None, "joined")
    assert found == [
        Measuring(False, None, None, "first"),
        Measuring(False, 2, 40, "first"),
        Measuring(True, None, None, "first"),
        Measuring(True, 2, 40, "first"),
        Measuring(True, None, None, "never"),
        Measuring(True, None, None, "never"),
    ]


@pytest.mark.parametrize(("subject", "what"), [(IMAGES, "images"), (SPEECH, "speech")])
def test_texts_for_what_takes_none_are_refused(subject: Any, what: str) -> None:
    with pytest.raises(DataError, match=f"the bundle takes {what}, not texts"):
        subject.tokens_of(SimpleNamespace(), "Hello")


def test_a_continuation_is_greedy_and_rows_rest() -> None:
    """Each step's best token is the last one plus one."""

    def after(tokens: list[int]) -> np.ndarray:
        return np.eye(9, dtype=np.float32)[[token + 1 for token in tokens]]

    probe = Probe("x", "mixed", ((0,), (3,)), (BASE, BASE), 4, rests=(0, 1))
    assert continued(after([0, 3]), after, probe) == [(1, 2, 3, 4), (4, 5, 6)]


def test_an_output_by_position() -> None:
    assert by_position(np.zeros(3)).shape == (1, 3)
    assert by_position(np.zeros((4, 3))).shape == (4, 3)


def test_it_imports_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, lora_edge.parity.subjects; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
