from __future__ import annotations

import re
import subprocess
import sys

import onnxruntime as ort
import pytest

from lora_edge.cli.export import command as export
from lora_edge.errors import OptionError
from lora_edge.targets.clients import CLIENTS
from lora_edge.targets.providers import PROVIDERS, provider, unknown
from lora_edge.targets.table import TARGETS, target
from lora_edge.targets.target import Target
from lora_edge.tasks.task import TASKS
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")


def test_names_are_unique() -> None:
    names = [name.lower() for each in TARGETS for name in (each.name, each.ort_name) if name]
    assert len(set(names)) == len(names)
    assert TARGETS[0].name == "cpu"


@pytest.mark.parametrize("known", TARGETS, ids=lambda known: known.name)
def test_a_target_is_found_under_its_names(known: Target) -> None:
    for name in filter(None, (known.name, known.ort_name)):
        assert target(name) is target(name.upper()) is known
        assert provider(name) is (known if known.ort_name else None)


@pytest.mark.parametrize("name", ["", "ExecutionProvider", "cuda ", "abacus"])
def test_other_names_are_not_found(name: str) -> None:
    assert provider(name) is None
    with pytest.raises(OptionError, match=f"no target {name!r}") as error:
        target(name)
    assert "cpu, cuda" in error.value.hint


def test_of_an_unknown_provider_nothing_is_taken_for_granted() -> None:
    abacus = unknown("AbacusExecutionProvider")
    assert (abacus.name, abacus.ort_name) == ("abacus", "AbacusExecutionProvider")
    rest = abacus._replace(name="", runs="", ort_name="")
    assert rest == Target("", "")
    assert {rest.zero_size, rest.dynamic_shapes, rest.runtime_weights, rest.form} == {None}


def test_targets_do_not_change() -> None:
    with pytest.raises(AttributeError):
        TARGETS[0].zero_size = False  # type: ignore[misc]


def test_onnxruntime_has_these_names() -> None:
    assert {each.ort_name for each in PROVIDERS} <= set(ort.get_all_providers())


def test_providers_have_a_name_in_onnxruntime_and_clients_none() -> None:
    assert all(each.ort_name for each in PROVIDERS)
    assert not any(each.ort_name for each in CLIENTS)


@pytest.mark.parametrize("known", TARGETS, ids=lambda known: known.name)
def test_each_target_says_what_brings_it_and_gives_its_own_options(known: Target) -> None:
    assert known.packages
    assert len({package.name for package in known.packages}) == len(known.packages)
    assert {key for key, _ in known.defaults} <= set(known.options)
    assert {*known.tasks} <= {*TASKS}
    for text in (known.runs, known.seen, known.device):
        assert text is None or not text.endswith(".")
    assert all(note.endswith(".") for note in known.notes)


def test_what_is_to_be_exported_can_be() -> None:
    choices = {str(each.name): getattr(each.type, "choices", ()) for each in export.params}
    assert {form for each in TARGETS for form in each.forms or ()} <= set(choices["form"])
    assert "merged" in choices["mode"]


def _packages(known: Target) -> str:
    return ", ".join(f"`{package.name}`" for package in known.packages)


def _made(known: Target) -> str:
    made = [f"`--form {known.form}`"] if known.form else []
    made += ["`--mode merged`"] if known.runtime_weights is False else []
    return ", ".join(made)


def _told(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def _row(known: Target) -> str:
    if not known.ort_name:
        loads = _told(known.adapter_api)
        forms = ", ".join(f"`{form}`" for form in known.forms or ())
        return _line(f"`{known.name}`", known.runs, _packages(known), forms, loads)
    return _line(
        f"`{known.name}`",
        f"`{known.ort_name}`",
        _packages(known),
        known.memory,
        "rank 0" if known.zero_size else "rank 1",
        _made(known),
        _told(None if known.dynamic_shapes is None else not known.dynamic_shapes),
        ", ".join(f"`{option}`" for option in known.options),
    )


def test_the_page_shows_the_tables() -> None:
    """To write the rows anew: python -m tests.targets.test_target."""
    rows = re.findall(r"^\| `[\w.]+` \| (?:`\w+ExecutionProvider`|[^`\n]+) \| `.*$", PAGE, re.M)
    assert rows == [_row(known) for known in TARGETS]


def test_the_table_needs_no_onnxruntime() -> None:
    code = "import sys, lora_edge.targets.table; print({'onnxruntime', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


if __name__ == "__main__":
    print("\n".join(map(_row, TARGETS)))
