from __future__ import annotations

import re
import subprocess
import sys

import onnxruntime as ort
import pytest

from lora_edge.cli.export import command as export
from lora_edge.targets.target import TARGETS, Target, target, unknown
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")


def test_names_are_unique() -> None:
    names = [name.lower() for each in TARGETS for name in (each.name, each.ort_name)]
    assert len(set(names)) == len(names)
    assert TARGETS[0].name == "cpu"


@pytest.mark.parametrize("known", TARGETS, ids=lambda known: known.name)
def test_a_target_is_found_under_both_names(known: Target) -> None:
    for name in (known.name, known.ort_name):
        assert target(name) is target(name.upper()) is known


@pytest.mark.parametrize("name", ["", "ExecutionProvider", "cuda ", "abacus"])
def test_other_names_are_not_found(name: str) -> None:
    assert target(name) is None


def test_of_an_unknown_provider_nothing_is_taken_for_granted() -> None:
    assert unknown("AbacusExecutionProvider") == Target("abacus", "AbacusExecutionProvider")
    assert not unknown("AbacusExecutionProvider").zero_rank


def test_targets_do_not_change() -> None:
    with pytest.raises(AttributeError):
        TARGETS[0].zero_rank = False  # type: ignore[misc]


def test_onnxruntime_has_these_names() -> None:
    assert {each.ort_name for each in TARGETS} <= set(ort.get_all_providers())


def test_what_is_to_be_exported_can_be() -> None:
    choices = {str(each.name): getattr(each.type, "choices", ()) for each in export.params}
    assert {each.form for each in TARGETS} - {None} <= set(choices["form"])
    assert "merged" in choices["mode"]


def _row(known: Target) -> str:
    made = [f"`--form {known.form}`"] if known.form else []
    made += ["`--mode merged`"] if known.constant_weights else []
    cells = [
        f"`{known.name}`",
        f"`{known.ort_name}`",
        known.memory,
        "rank 0" if known.zero_rank else "rank 1",
        ", ".join(made),
        "yes" if known.fixed_shapes else "",
        ", ".join(f"`{option}`" for option in known.options),
    ]
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def test_the_page_shows_the_table() -> None:
    """To write the rows anew: python -m tests.targets.test_target."""
    rows = re.findall(r"^\| `\w+` \| `\w+ExecutionProvider` .*$", PAGE, re.M)
    assert rows == [_row(known) for known in TARGETS]


def test_the_table_needs_no_onnxruntime() -> None:
    code = (
        "import sys, lora_edge.targets.target; print({'onnxruntime', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


if __name__ == "__main__":
    print("\n".join(map(_row, TARGETS)))
