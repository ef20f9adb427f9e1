"""Regression: what is worse than before, and what is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lora_edge
from lora_edge.reports import compare

Reports = dict[str, dict[str, Any]]


def _case(data: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(case for case in data["cases"] if case["name"] == name)
    return found


def test_the_same_again_is_not_worse(reports: Reports, bundle: Path) -> None:
    again = lora_edge.validate(bundle, optimization=["all", "disable"], depth="quick").to_data()
    assert compare(again, reports["good"]) == []
    assert compare(reports["good"], again) == []


def test_a_level_of_optimization_is_within_the_spread(reports: Reports) -> None:
    """Rounding in another order is no regression; what lies around a graph has one session."""
    data = reports["good"]
    by_level: dict[str, dict[str, Any]] = {}
    for level in ("all", "disable"):
        own = [case for case in data["cases"] if case["session"] == f"cpu, {level}"]
        cases = [case for case in own if case["figures"]]
        by_level[level] = {**data, "cases": [{**case, "session": ""} for case in cases]}
    assert compare(by_level["all"], by_level["disable"]) == []
    assert compare(by_level["disable"], by_level["all"]) == []


def _fail(case: dict[str, Any]) -> None:
    case["status"] = "failed"


def _grow(case: dict[str, Any]) -> None:
    figures = case["figures"]
    figures["effect_error"] += 1.01 * figures["error_spread"]


def _grow_within(case: dict[str, Any]) -> None:
    figures = case["figures"]
    figures["effect_error"] += 0.99 * figures["error_spread"]


def _shrink(case: dict[str, Any]) -> None:
    case["figures"]["effect_error"] = 0.0


def _vanish(case: dict[str, Any]) -> None:
    case["name"] = "another"


def _overflow(case: dict[str, Any]) -> None:
    case["figures"]["effect_error"] = None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_fail, "passed before, and is failed now"),
        (_grow, "more than its own spread"),
        (_vanish, "is not any more"),
        (_overflow, "and is -"),
        (_grow_within, None),
        (_shrink, None),
    ],
)
def test_what_counts(
    reports: Reports, change: Callable[[dict[str, Any]], None], words: str | None
) -> None:
    before = reports["good"]
    now = copy.deepcopy(before)
    change(_case(now, "adapter echo"))
    found = compare(now, before)
    if words is None:
        assert found == []
    else:
        (regression,) = found
        assert regression.name == "adapter echo"
        assert words in regression.text


def test_a_session_that_did_not_run_is_one_line(reports: Reports) -> None:
    before = reports["good"]
    now = {
        **before,
        "sessions": [each for each in before["sessions"] if each["optimization"] == "all"],
        "cases": [case for case in before["cases"] if case["session"] == "cpu, all"],
    }
    count = sum(case["session"] == "cpu, disable" for case in before["cases"])
    assert count > 12
    (lost,) = compare(now, before)
    assert lost.text == (
        f"cpu, disable: its {count} cases were checked before, and the session did not run"
    )
    assert compare(before, now) == []


def test_a_proof_that_came_is_no_loss(reports: Reports) -> None:
    before = reports["unproved"]
    proved = [case for case in before["cases"] if case["kind"] != "proof"]
    assert len(proved) == len(before["cases"]) - 1
    assert compare({**before, "cases": proved}, before) == []
    assert len(compare({**before, "cases": proved[1:]}, before)) == 1


def test_what_failed_before_may_fail(reports: Reports) -> None:
    assert compare(reports["faulty"], reports["faulty"]) == []
    worse = {each.name for each in compare(reports["faulty"], reports["good"])}
    assert "adapter mirror" in worse
    assert "adapter echo" not in worse
