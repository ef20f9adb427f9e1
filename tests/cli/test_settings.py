from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from lora_edge.cli import settings


def _read(option: Any, *arguments: str) -> tuple[Any, str]:
    """The value that a command gets, and what it complains of."""
    found: list[Any] = [None]

    @click.command()
    @option
    def command(**values: Any) -> None:
        (found[0],) = values.values()

    result = CliRunner().invoke(command, arguments)
    return found[0], result.stderr


@pytest.mark.parametrize(
    ("option", "text", "expected"),
    [
        ("--layers", "0, 2-4,4", (0, 2, 3, 4, 4)),
        ("--modules-to-save", "a, b,", ("a", "b")),
        ("--target-modules", "q_proj,v_proj", ("q_proj", "v_proj")),
        ("--target-modules", "all-linear", "all-linear"),
        ("--target-modules", r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
    ],
)
def test_texts_are_read(option: str, text: str, expected: object) -> None:
    read = {
        "--layers": settings.layers,
        "--modules-to-save": settings.names,
        "--target-modules": settings.targets,
    }[option]
    assert _read(click.option(option, callback=read), option, text) == (expected, "")
    assert _read(click.option(option, callback=read)) == (None, "")


@pytest.mark.parametrize("text", ["", "a", "4-2", "-1"])
def test_layers_that_are_none_are_refused(text: str) -> None:
    _, complaint = _read(click.option("--layers", callback=settings.layers), "--layers", text)
    assert "is not a layer or a span" in complaint


def test_patterns_are_numbers_by_module() -> None:
    rank = settings.pattern("rank", settings.whole)
    given = ("--rank-pattern", "q_proj=4", "--rank-pattern", "a=b=8")
    assert _read(rank, *given) == ({"q_proj": 4, "a=b": 8}, "")
    assert _read(rank) == (None, "")
    assert "is not KEY=NUMBER" in _read(rank, "--rank-pattern", "q_proj")[1]
    assert "2.5 is not a whole number" in _read(rank, "--rank-pattern", "q_proj=2.5")[1]
    alpha = settings.pattern("alpha", float)
    assert _read(alpha, "--alpha-pattern", "q_proj=2.5") == ({"q_proj": 2.5}, "")


def test_the_default_of_a_setting_is_said_and_not_given() -> None:
    assert _read(settings.setting("--rank", "r.")) == (None, "")
    assert _read(settings.setting("--rank", "r."), "--rank", "4") == (4, "")
    assert _read(settings.setting("--dora", "A magnitude."), "--dora") == (True, "")
