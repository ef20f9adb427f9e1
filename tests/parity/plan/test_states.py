"""The plan covers what it promises."""

from __future__ import annotations

import json

import pytest

from lora_edge.errors import BundleError
from lora_edge.files.schema import decode
from lora_edge.parity.plan.plan import blend_of, plan
from lora_edge.parity.plan.states import BASE, Probe, label, only, schedule, state_of

NAMES = ("a", "b", "c")


def _plan(names: tuple[str, ...] = NAMES, **changes: int) -> tuple[Probe, ...]:
    settings = {"vocab_size": 97, "max_length": 512, "steps": 16, **changes}
    return plan(names, **settings)


def test_every_state_is_there() -> None:
    base, a, b, c, blend, mixed = (probe for probe in _plan() if not probe.part)
    assert [probe.kind for probe in (base, a, blend, mixed)] == [
        "base",
        "adapter",
        "blend",
        "mixed",
    ]
    assert set(base.states) == {BASE}
    assert [probe.adapters for probe in (a, b, c)] == [("a",), ("b",), ("c",)]
    assert set(blend.states) == {(("a", 0.7), ("b", 0.3))}
    assert len(mixed.rows) == 8
    assert set(mixed.states) == {only("a"), only("b"), only("c"), BASE, blend.states[0]}
    for probe in (base, mixed):
        assert len({len(row) for row in probe.rows}) == len(probe.rows)


def test_no_and_one_and_many_adapters() -> None:
    assert {probe.kind for probe in _plan(())} == {"base"}
    assert blend_of(("a",)) == (("a", 0.5),)
    many = tuple(f"n{i}" for i in range(12))
    assert sum(probe.kind == "adapter" and not probe.part for probe in _plan(many)) == 12
    assert [len(probe.rows) for probe in _plan(many) if probe.kind == "mixed"] == [8, 8, 16]


def test_the_seed_decides_the_prompts() -> None:
    assert _plan() == _plan()
    assert _plan(seed=1)[0].rows != _plan()[0].rows


@pytest.mark.parametrize("max_length", [2, 12, 40])
def test_prompt_and_steps_fit_the_positions(max_length: int) -> None:
    for probe in _plan(max_length=max_length, steps=64):
        assert probe.steps >= 1
        assert min(map(len, probe.rows)) >= 1
        assert max(map(len, probe.rows)) + probe.steps <= max_length


def test_a_short_window_is_crossed_by_prompt_and_by_decode() -> None:
    lengths = [len(row) for row in _plan(window=32)[0].rows]
    assert max(lengths) > 32
    assert any(length < 32 < length + 16 for length in lengths)


def test_given_prompts_come_first() -> None:
    probes = plan(NAMES, vocab_size=97, max_length=512, steps=4, given=[(1, 2, 3)])
    assert probes[0].rows[0] == (1, 2, 3)
    assert len(probes[0].rows) == 4


def test_rows_rest_after_their_second_token_and_end() -> None:
    steps = schedule([(1, 2, 3), (4, 5, 6), (7,)], [0, 2, 3])
    assert steps == [(1, 4, 7), (2, 5, None), (3, None, None), (None, 6, None)]
    assert schedule([(1, 2), (3, 4)]) == [(1, 3), (2, 4)]
    assert schedule([(), ()]) == []


def test_labels_and_json() -> None:
    assert label(BASE) == "base"
    assert label(state_of("a")) == "a"
    assert label(state_of({"b": 0.3, "a": 0.7})) == "0.7 a + 0.3 b"
    assert label(state_of({"b": -0.3, "a": -0.7})) == "-0.7 a - 0.3 b"
    for probe in _plan():
        read = json.loads(json.dumps(probe.to_json()))
        assert decode(Probe, read, "probe", BundleError, "") == probe
