"""The benchmark runs and reports every contestant; no time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import contestants as of
import decode
import numpy as np
import pytest
from decode import ratio, verdict
from measure import compare
from prepare import genai_installed

OURS = {of.MERGED, of.ON, of.OFF, of.ON_PINNED, of.OFF_PINNED, of.PEFT, of.EAGER}


@pytest.mark.slow
@pytest.mark.long
def test_every_contestant_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    command = [sys.executable, str(decode.__file__), "--tiny", "--processes", "1"]
    command += ["--steps", "5", "--threads", "1", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = OURS | ({of.REFERENCE, of.AGAIN} if genai_installed() else set())
    results = json.loads(file.read_text(encoding="utf-8"))
    (medians,) = results["median_seconds"]
    assert set(medians) == expected
    assert all(seconds > 0 for seconds in medians.values())
    assert set(results["speed"]) == expected - {of.REFERENCE if genai_installed() else of.MERGED}
    targets = {(entry["name"], entry["over"]) for entry in results["targets"]}
    over_merged = {(name, of.MERGED) for name in (of.ON, of.OFF, of.ON_PINNED, of.OFF_PINNED)}
    assert over_merged | {(of.ON, of.PEFT)} <= targets
    for name in expected:
        assert name in done.stdout


def test_a_ratio_is_of_speeds_and_takes_both_entries_of_the_reference() -> None:
    runs = [
        {of.REFERENCE: 1.0, of.AGAIN: 4.0, of.MERGED: 1.0},
        {of.REFERENCE: 2.0, of.AGAIN: 2.0, of.MERGED: 4.0},
    ]
    merged = ratio(runs, of.MERGED, of.REFERENCE)
    assert (merged.lowest, merged.highest) == pytest.approx((0.5, 2.0))
    assert merged.value == pytest.approx(1.0)
    again = ratio(runs, of.AGAIN, of.REFERENCE)
    assert (again.lowest, again.highest) == pytest.approx((0.25, 1.0))
    assert ratio(runs[:1], of.MERGED, of.REFERENCE).error is None


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
    runs = [{of.MERGED: 1.0, of.ON: 1 / speed} for speed in speeds]
    assert verdict(ratio(runs, of.ON, of.MERGED), 0.95) == expected


def test_a_contestant_that_runs_another_model_is_found_out() -> None:
    plain, adapted = np.zeros(3, np.float32), np.ones(3, np.float32)
    logits = {of.MERGED: adapted, of.ON: adapted, of.PEFT: adapted, of.OFF: plain, of.EAGER: plain}
    compare(logits)
    with pytest.raises(RuntimeError, match="switchable on and merged disagree"):
        compare({**logits, of.ON: plain})
    with pytest.raises(RuntimeError, match="PyTorch eager and switchable off disagree"):
        compare({**logits, of.EAGER: adapted})
    with pytest.raises(RuntimeError, match="no difference"):
        compare(dict.fromkeys(logits, plain))
