"""The table of docs/faults.md is the suite's own: the same faults, all caught."""

from __future__ import annotations

import pytest

from tests.faults.fault_table import FAULTS, Outcome
from tests.support.modules import load_file
from tests.support.paths import ROOT

maker = load_file("ci_faults", ROOT / "ci" / "faults.py")

REASON = (
    "adapter a: logit error 1.0e+00 exceeds the limit 1.0e-05 (floor 1.0e-06); effect-relative "
    "error 5.0e-01; it has 0.80 times PyTorch's effect; the file of a differs from its PEFT files "
    "at 3 of 8 places: model.layers.1.self_attn.q_proj (B is zero), "
    "model.layers.0.mlp.up_proj (A and B), x (B)"
)


def _rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines][1:]


def test_the_page_lists_every_fault_as_caught() -> None:
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    assert text.count(maker.BEGIN) == text.count(maker.END) == 1
    made = text.partition(maker.BEGIN)[2].partition(maker.END)[0]
    rows = _rows(made)
    assert [row[0] for row in rows] == [fault.name for fault in FAULTS]
    assert all(row[1] == "yes" and row[2] for row in rows)
    assert "false alarms 0 of " in made


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(False, True, True, REASON),
        Outcome(True, False, True, REASON),
        Outcome(True, True, False, REASON),
    ],
)
def test_a_miss_is_written_as_one(outcome: Outcome) -> None:
    row = maker.Row(FAULTS[0], (Outcome(True, True, True, REASON), outcome))
    assert not row.killed
    (full,) = _rows(maker.full_table([row], {}).partition("\n\n")[0])
    assert full[2:4] == ["killed", "MISSED"]
    (short,) = _rows(maker.short_table([row], "killed 0 of 1"))
    assert short[1] == "NO"


def test_the_explanation_is_what_stands_behind_the_figures() -> None:
    row = maker.Row(FAULTS[0], (Outcome(True, True, True, REASON),) * 2)
    said = maker.explanation(row)
    assert said.startswith(
        "the file of a differs from its PEFT files at 3 of 8 places: model.layers"
    )
    short = maker.shortened(said)
    assert short.endswith("at 3 of 8 places: 1.self_attn.q_proj (B is zero) and others")
