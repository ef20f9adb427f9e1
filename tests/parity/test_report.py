"""The report: what counts as passed, its JSON and its table."""

from __future__ import annotations

import json
import math

from lora_edge.parity.case import Case
from lora_edge.parity.compare import Figures, Limits
from lora_edge.parity.report import Report

FIGURES = Figures(60, 3e-6, 4e-7, 2.5, 0.7, 3.0, 1.0, 1.0, 0, 0, 1e-12)
LIMITS = Limits(1e-6, 1e-5, 1e-7, 1e-6)
GOOD = Case("adapter a", ("a",), "passed", "", FIGURES, LIMITS, {"zeroed": 1.0})
BASE = Case("base", (), "passed", "", FIGURES, Limits(1e-6, 1e-5, math.inf, math.inf))
DEAD = Case("adapter b", ("b",), "unproved", "adapter b: no effect", FIGURES, LIMITS)
SWITCH = Case("b -> a -> b, bit for bit", ("b",), "passed")


def _report(*cases: Case) -> Report:
    return Report("bundle", "switchable", "goldens", ("a", "b"), cases, {"onnxruntime": "1"}, 1.25)


def test_only_passed_counts() -> None:
    assert _report(BASE, GOOD).passed
    assert not _report(BASE, GOOD, DEAD).passed
    assert not _report().passed
    assert _report(BASE, GOOD, DEAD).failures == (DEAD,)


def test_an_adapter_passes_by_a_comparison_of_its_own() -> None:
    report = _report(GOOD, SWITCH)
    assert report.adapter_passed("a")
    assert not report.adapter_passed("b")  # switching alone proves nothing
    row = Case("mixed row 0: a", ("a",), "failed", "mixed row 0: a: wrong", FIGURES, LIMITS)
    assert not _report(GOOD, row).adapter_passed("a")


def test_a_shared_failure_is_the_fault_of_the_one_that_fails_alone() -> None:
    good_b = Case("adapter b", ("b",), "passed", "", FIGURES, LIMITS)
    shared = Case("blend a + b", ("a", "b"), "failed", "blend a + b: wrong", FIGURES, LIMITS)
    explained = _report(GOOD, DEAD, shared)
    assert explained.adapter_passed("a")
    assert not explained.adapter_passed("b")
    unexplained = _report(GOOD, good_b, shared)
    assert not unexplained.adapter_passed("a")
    assert not unexplained.adapter_passed("b")


def test_a_metric_that_cannot_tell_withdraws_no_proof() -> None:
    mute = Case("adapter a, accuracy", ("a",), "unproved", "a: does not show", kind="task")
    assert _report(GOOD, mute).adapter_passed("a")
    assert not _report(GOOD, mute).passed
    shared = Case("blend a + b", ("a", "b"), "failed", "blend a + b: wrong", FIGURES, LIMITS)
    good_b = Case("adapter b", ("b",), "passed", "", FIGURES, LIMITS)
    assert not _report(GOOD, good_b, mute, shared).adapter_passed("b")
    worse = Case("adapter a, accuracy", ("a",), "failed", "a: worse", kind="task")
    assert not _report(GOOD, worse).adapter_passed("a")


def test_json_is_strict_and_versioned() -> None:
    data = json.loads(_report(BASE, GOOD, SWITCH).to_json())
    assert data["schema_version"] == 2
    assert data["passed"] is True
    assert data["cases"][0]["limits"]["effect"] is None  # inf
    assert data["cases"][1]["figures"]["logit_error"] == 3e-6
    assert data["cases"][1]["controls"] == {"zeroed": 1.0}
    assert data["cases"][2]["figures"] is None


def test_table_has_a_block_for_each_adapter_and_the_reasons() -> None:
    text = _report(BASE, GOOD, DEAD, SWITCH).table()
    lines = text.splitlines()
    for title in ("no adapter", "adapter a", "adapter b"):
        assert title in lines
    assert "unproved: adapter b: no effect" in lines
    assert lines[-1] == "NOT PASSED: 3 of 4 cases against the recorded goldens, 1.2 s"
    assert max(map(len, lines)) <= 120
    assert _report(BASE, GOOD).table().splitlines()[-1].startswith("passed: 2 of 2")
