"""Golden cases: small, whole again when read, and as telling as whole logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_edge.errors import BundleError
from lora_edge.parity.compare import Floor, Tolerance, expect, measure
from lora_edge.parity.plan.plan import plan
from lora_edge.parity.plan.states import Probe, label, only
from lora_edge.parity.record.golden import Golden, load_golden, reduce, save_golden, stem_of

VOCAB = 503


@pytest.fixture
def golden() -> Golden:
    random = np.random.default_rng(0)
    rows = ((1, 2, 3), (4, 5, 6, 7, 8))
    tails = ((9, 10), (11, 12))
    logits = [random.normal(0, 4, (len(row) + 2, VOCAB)).astype(np.float32) for row in rows]
    bases = [row + random.normal(0, 1, row.shape).astype(np.float32) for row in logits]
    return Golden(
        Probe("adapter my-one.v2", "adapter", rows, (only("my-one.v2"),) * 2, 2),
        tails,
        tuple(expect(y, b) for y, b in zip(logits, bases, strict=True)),
        {"my-one.v2": Floor(2e-6, 4e-7)},
        {"torch": "2.x"},
    )


def test_round_trip(golden: Golden, tmp_path: Path) -> None:
    small = reduce(golden, 4)
    relative = save_golden(tmp_path, small)
    assert stem_of(relative) == golden.stem == "adapter-my-one.v2"
    again = load_golden(tmp_path / relative)
    assert replace(again, expected=()) == replace(small, expected=())
    for one, other in zip(small.expected, again.expected, strict=True):
        for field in vars(one):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
    assert save_golden(tmp_path, small) == relative  # the same content has the same name


def test_columns_are_distinct_and_hold_the_best(golden: Golden) -> None:
    for row in reduce(golden, 4).expected:
        assert row.columns is not None
        assert all(len(set(columns)) == len(columns) for columns in row.columns)
        assert all(top in columns for top, columns in zip(row.top1, row.columns, strict=True))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0])
def test_reduced_figures_are_close_to_whole_ones(golden: Golden, scale: float) -> None:
    floor = golden.floors["my-one.v2"]
    actual = [row.base + np.float32(scale) * (row.reference - row.base) for row in golden.expected]
    whole = measure(golden.expected, actual, floor, Tolerance())
    part = measure(reduce(golden, 4).expected, actual, floor, Tolerance())
    assert part.effect_error == pytest.approx(whole.effect_error, abs=1e-6)
    assert part.gain == pytest.approx(whole.gain, abs=1e-6)
    assert part.token_differences == whole.token_differences
    assert part.kl <= whole.kl + 1e-9
    if scale != 1.0:
        assert part.kl > 0.3 * whole.kl


def _of_plan(probe: Probe) -> Golden:
    """Synthetic logits of the plan's own size; noise, which does not compress."""
    random = np.random.default_rng(len(probe.name))
    counts = [probe.steps - rest for rest in probe.rests or (0,) * len(probe.rows)]
    tails = tuple(tuple(random.integers(0, 300, count).tolist()) for count in counts)
    expected = []
    for row, state, count in zip(probe.rows, probe.states, counts, strict=True):
        logits = random.normal(0, 4, (len(row) + count, 300)).astype(np.float32)
        base = logits + random.normal(0, 1, logits.shape).astype(np.float32)
        expected.append(expect(logits, base if state else None))
    floors = {label(state): Floor(2e-6, 4e-7) for state in probe.states}
    return Golden(probe, tails, tuple(expected), floors, {"torch": "2.x"})


@pytest.mark.parametrize(("count", "window"), [(3, None), (12, None), (12, 128), (40, 128)])
def test_all_cases_together_stay_within_a_megabyte(
    count: int, window: int | None, tmp_path: Path
) -> None:
    names = [f"adapter-{index}" for index in range(count)]
    probes = plan(names, vocab_size=300, max_length=512, steps=64, window=window)
    count_of_short = sum(not probe.part for probe in probes)
    small = [reduce(_of_plan(probe), count_of_short) for probe in probes]
    size = sum((tmp_path / save_golden(tmp_path, golden)).stat().st_size for golden in small)
    assert size <= 1_000_000
    for golden, probe in zip(small, probes, strict=True):
        assert (golden.probe.rows, golden.probe.states) == (probe.rows, probe.states)
        assert golden.probe.steps == probe.steps or count > 12
        for row, prompt, tail in zip(golden.expected, probe.rows, golden.tails, strict=True):
            assert row.reference.shape[1] >= 4
            assert row.length == len(prompt) + len(tail)
            assert row.places is None or golden.probe.part or count > 12
            assert len(tail) == golden.probe.steps >= 1 or golden.probe.part


def test_a_tiny_vocabulary_is_kept_whole(golden: Golden) -> None:
    few = expect(golden.expected[0].reference[:, :5])
    tiny = replace(golden, expected=(few,), tails=golden.tails[:1])
    (row,) = reduce(tiny, 4).expected
    assert row.columns is not None
    assert sorted(row.columns[0]) == [0, 1, 2, 3, 4]
    assert row.base is None


def _with(file: Path, **changes: Any) -> None:
    with np.load(file) as arrays:
        held = {name: arrays[name] for name in arrays.files}
    for name, value in changes.items():
        if value is None:
            del held[name.replace("_", ".", 1)]
        else:
            held[name.replace("_", ".", 1)] = np.array(value)
    np.savez_compressed(file, **held)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"facts": None}, "facts is not JSON"),
        ({"facts": "[]"}, "facts is not a JSON object"),
        ({"facts": "{}"}, "facts: floors is missing"),
        ({"facts": '{"probe": 3, "tails": [], "floors": {}, "versions": {}}'}, "probe is 3"),
        ({"0_columns": None}, "not a golden case"),
        ({"0_columns": "x"}, "not a golden case"),
        ({"0_top1": [1, 2]}, "top1 is"),
        ({"0_margin": [[1.0]]}, "margin is"),
        ({"0_reference": [[float("nan")] * 24] * 5}, "reference holds NaN"),
        ({"0_log_total": ["a"] * 5}, "log_total is"),
    ],
)
def test_what_does_not_belong_together_is_an_error(
    changes: dict[str, Any], words: str, golden: Golden, tmp_path: Path
) -> None:
    file = tmp_path / save_golden(tmp_path, reduce(golden, 4))
    _with(file, **changes)
    with pytest.raises(BundleError, match=words):
        load_golden(file)


def test_columns_that_the_outputs_do_not_have_are_an_error(golden: Golden) -> None:
    small = reduce(golden, 4)
    (row, _) = small.expected
    assert row.columns is not None
    logits = np.zeros((row.length, int(row.columns.max())), np.float32)
    with pytest.raises(BundleError, match=r"column \d+ of outputs that have"):
        measure([row], [logits], Floor(1e-6, 1e-7), Tolerance())


def test_a_flipped_byte_of_the_archive_is_an_error(golden: Golden, tmp_path: Path) -> None:
    file = tmp_path / save_golden(tmp_path, reduce(golden, 4))
    content = bytearray(file.read_bytes())
    for at in range(80, 400, 40):
        flipped = content.copy()
        flipped[at] ^= 0xFF
        file.write_bytes(flipped)
        with pytest.raises(BundleError):
            load_golden(file)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x93NUMPY"])
def test_damage_is_an_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "adapter-a-01234567.npz"
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"not a whole \.npz file"):
        load_golden(file)
