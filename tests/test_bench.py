"""The benchmark runs and reports every contestant; no time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import decode
import hot_loop
import numpy as np
import pytest
from contestants import (
    AGAIN,
    EAGER,
    MERGED,
    OFF,
    OFF_PINNED,
    ON,
    ON_PINNED,
    PEFT,
    REFERENCE,
)
from decode import ratio, verdict
from measure import compare
from prepare import genai_installed

OURS = {MERGED, ON, OFF, ON_PINNED, OFF_PINNED, PEFT, EAGER}


@pytest.mark.slow
@pytest.mark.long
def test_every_contestant_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    command = [sys.executable, str(decode.__file__), "--tiny", "--processes", "1"]
    command += ["--steps", "5", "--threads", "1", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = OURS | ({REFERENCE, AGAIN} if genai_installed() else set())
    results = json.loads(file.read_text(encoding="utf-8"))
    (medians,) = results["median_seconds"]
    assert set(medians) == expected
    assert all(seconds > 0 for seconds in medians.values())
    assert set(results["speed"]) == expected - {REFERENCE if genai_installed() else MERGED}
    targets = {(entry["name"], entry["over"]) for entry in results["targets"]}
    over_merged = {(name, MERGED) for name in (ON, OFF, ON_PINNED, OFF_PINNED)}
    assert over_merged | {(ON, PEFT)} <= targets
    for name in expected:
        assert name in done.stdout


@pytest.mark.slow
@pytest.mark.long
def test_the_hot_loop_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    command = [sys.executable, str(hot_loop.__file__), "--tiny", "--processes", "2"]
    command += ["--turns", "2", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text(encoding="utf-8"))
    seconds = results["milliseconds"]
    assert set(seconds) == {"step", "own", "switch", "load", "hash"}
    assert all(len(each) == 2 and min(each) > 0 for each in seconds.values())
    for name, over, under, _ in hot_loop.RATIOS:
        ratios = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
        found = results["ratios"][name]
        assert (found["lowest"], found["highest"]) == pytest.approx((min(ratios), max(ratios)))
        assert name in done.stdout


def test_a_ratio_is_of_speeds_and_takes_both_entries_of_the_reference() -> None:
    runs = [
        {REFERENCE: 1.0, AGAIN: 4.0, MERGED: 1.0},
        {REFERENCE: 2.0, AGAIN: 2.0, MERGED: 4.0},
    ]
    merged = ratio(runs, MERGED, REFERENCE)
    assert (merged.lowest, merged.highest) == pytest.approx((0.5, 2.0))
    assert merged.value == pytest.approx(1.0)
    again = ratio(runs, AGAIN, REFERENCE)
    assert (again.lowest, again.highest) == pytest.approx((0.25, 1.0))
    assert ratio(runs[:1], MERGED, REFERENCE).error is None


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ((1.0, 1.0), "reached"),
        ((0.8, 1.2), "reached, within the error"),
        ((0.7, 1.1), "missed, within the error"),
        ((0.5, 0.5), "missed"),
    ],
)
def test_a_verdict_minds_the_spread(speeds: tuple[float, ...], expected: str) -> None:
    runs = [{MERGED: 1.0, ON: 1 / speed} for speed in speeds]
    assert verdict(ratio(runs, ON, MERGED), 0.95) == expected


def test_a_contestant_that_runs_another_model_is_found_out() -> None:
    plain, adapted = np.zeros(3, np.float32), np.ones(3, np.float32)
    logits = {MERGED: adapted, ON: adapted, PEFT: adapted, OFF: plain, EAGER: plain}
    compare(logits)
    with pytest.raises(RuntimeError, match="switchable on and merged disagree"):
        compare({**logits, ON: plain})
    with pytest.raises(RuntimeError, match="PyTorch eager and switchable off disagree"):
        compare({**logits, EAGER: adapted})
    with pytest.raises(RuntimeError, match="no difference"):
        compare(dict.fromkeys(logits, plain))
