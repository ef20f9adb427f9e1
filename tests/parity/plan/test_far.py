"""The plan goes where users are: lengths, batches, blends, rows that rest."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from lora_edge.parity.plan.far import CROWD, LONG
from lora_edge.parity.plan.plan import Depth, plan
from lora_edge.parity.plan.states import BASE, Probe, Row, label, only, schedule

NAMES = ("a", "b", "c")


def _plan(names: tuple[str, ...] = NAMES, **changes: Any) -> tuple[Probe, ...]:
    settings = {"vocab_size": 97, "max_length": 2048, "steps": 64, "decoded": 256, **changes}
    return plan(names, **settings)


def _longest(probes: tuple[Probe, ...], name: str | None) -> int:
    state = BASE if name is None else only(name)
    rows = [pair for probe in probes for pair in zip(probe.rows, probe.states, strict=True)]
    return max(len(row) for row, own in rows if own == state)


@pytest.mark.parametrize("name", [None, *NAMES])
def test_every_state_has_a_prompt_of_a_few_hundred_tokens(name: str | None) -> None:
    assert 300 <= _longest(_plan(), name) <= 500
    assert _longest(_plan(max_length=256), name) == 248
    assert _longest(_plan(max_length=40), name) <= 24  # no room for one that is worth it


def test_a_large_model_has_one_for_the_base_and_the_first() -> None:
    probes = _plan(everyone=False)
    assert [_longest(probes, name) >= LONG for name in (None, *NAMES)] == [True, True, False, False]


def test_a_window_is_gone_past() -> None:
    assert _longest(_plan(window=512), None) > 512
    assert _longest(_plan(window=4096), None) == LONG
    assert _longest(_plan(window=512, affordable=300), None) == 300


@pytest.mark.parametrize("names", [NAMES, ("a", "b"), ("a",), (), tuple("abcdefghijklmnopqrst")])
def test_batches_of_1_2_8_and_16(names: tuple[str, ...]) -> None:
    sizes = {len(probe.rows) for probe in _plan(names)}
    assert sizes >= {1, 2, CROWD}
    assert 8 in sizes or not names
    if names:
        merged = [p for p in _plan(names[:1], merged=True) if p.kind == "adapter"]
        assert {len(probe.rows) for probe in merged} == {1, 2, 4, CROWD}
        assert {probe.states for probe in merged} == {(only("a"),) * n for n in (1, 2, 4, CROWD)}


def test_a_blend_of_three_with_a_negative_weight() -> None:
    def blends(names: tuple[str, ...]) -> list[str]:
        return [label(probe.states[0]) for probe in _plan(names) if probe.kind == "blend"]

    assert blends(NAMES) == ["0.7 a + 0.3 b", "0.6 a - 0.4 b + 0.5 c"]
    assert blends(("a", "b")) == ["0.7 a + 0.3 b", "0.8 a - 0.5 b"]
    assert blends(("a",)) == ["0.5 a", "-0.5 a"]
    assert [p.states for p in _plan(blendable=()) if p.kind == "blend"] == []
    crowd = _plan()[-1]
    assert {label(state) for state in crowd.states} >= {"base", *NAMES, *blends(NAMES)}


def test_some_rows_of_a_crowd_rest_while_others_go_on() -> None:
    crowd = _plan()[-1]
    tails = [(1,) * (crowd.steps - rest) for rest in crowd.rests]
    steps = schedule(tails, crowd.rests)
    resting = {row for step in steps for row, token in enumerate(step) if token is None}
    assert len(steps) == crowd.steps
    assert 0 < len(resting) < CROWD
    assert all(any(token is not None for token in step) for step in steps)
    assert all(step[row] is not None for row in resting for step in (steps[0], steps[-1]))
    assert len({len(row) for row in crowd.rows}) == CROWD
    assert not any(probe.rests for probe in _plan(decoded=0))  # without a cache nothing rests


def test_full_sweeps_the_lengths_and_decodes_on() -> None:
    probes = _plan(depth="full")
    lengths = [len(p.rows[0]) for p in probes if p.part.startswith("length") and not p.states[0]]
    assert lengths == [128, 256, 512, 1024, 2040]
    assert all(_longest(probes, name) == 2040 for name in (None, *NAMES))
    assert max(probe.steps for probe in probes) == 256 > max(probe.steps for probe in _plan())
    assert not any(probe.kept for probe in probes if probe not in _plan())
    few = _plan(depth="full", affordable=700)
    assert max(len(row) for probe in few for row in probe.rows) == 700


@pytest.mark.parametrize("depth", ["quick", "normal", "full"])
@pytest.mark.parametrize("max_length", [2, 12, 40, 129, 1000])
def test_all_of_it_fits(depth: Depth, max_length: int) -> None:
    for probe in _plan(max_length=max_length, depth=depth):
        assert probe.steps >= 1
        assert min(map(len, probe.rows)) >= 1
        assert max(map(len, probe.rows)) + probe.steps <= max_length


def test_quick_is_what_it_was() -> None:
    assert not any(probe.part or probe.rests for probe in _plan(depth="quick"))
    assert [probe.name for probe in _plan(depth="quick")] == [
        "base", "adapter a", "adapter b", "adapter c", "blend 0.7 a + 0.3 b", "mixed rows",
    ]  # fmt: skip


def test_a_long_prompt_has_the_shape_that_is_given_and_all_that_is_waited_for() -> None:
    def shaped(length: int, _: int) -> Row | None:
        return (11,) * (length - 5)

    probes = {p.name: p for p in _plan(shaped=shaped, reach={"b": [(7, 8)]})}
    assert set(probes["adapter a, long prompt"].rows[0]) == {11}
    (row,) = probes["adapter b, long prompt"].rows
    assert (7, 8) in pairwise(row)
    assert len(row) == LONG - 5
    for probe in probes.values():
        for own, state in zip(probe.rows[1:], probe.states[1:], strict=True):
            if state == only("b"):
                assert (7, 8) in pairwise(own)
