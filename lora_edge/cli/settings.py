"""The options of ``train`` that are fields of its settings: how they are given and read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import click

from lora_edge.cli.options import Option
from lora_edge.training.settings import Settings

_NUMBER = re.compile(r"\d+(\.\d+)?")
_REGEX_SIGNS = re.compile(r"[\\^$*+?()\[\]{}|]")
_SPAN = re.compile(r"(\d+)(?:-(\d+))?")


def setting(name: str, help: str, **more: Any) -> Option:
    """An option that is a field of Settings: not given, a preset or the default decides."""
    field = name.removeprefix("--").partition("/")[0].replace("-", "_")
    usual = {entry.name: entry.default for entry in fields(Settings)}[field]
    if isinstance(usual, bool):
        more |= {"is_flag": True, "flag_value": True}
    elif usual is not None and not isinstance(usual, tuple):
        more.setdefault("type", type(usual))
        help = f"{help}  [default: {usual}]"
    return click.option(name, field, default=None, help=help, **more)


def pattern(what: str, number: Callable[[str], float]) -> Option:
    """A setting of its own for some modules: module name or regex -> number."""

    def read(
        _context: Any, _parameter: Any, pairs: Sequence[tuple[str, str]]
    ) -> dict[str, float] | None:
        return {key: number(text) for key, text in pairs} or None

    return click.option(
        f"--{what}-pattern",
        f"{what}_pattern",
        multiple=True,
        type=_pair,
        callback=read,
        metavar=f"KEY={what.upper()}",
        help=f"Another {what} for the modules of this name or regex. Repeatable; the first match "
        "wins.",
    )


def _pair(text: str) -> tuple[str, str]:
    key, separator, number = text.rpartition("=")
    if not (key and separator and _NUMBER.fullmatch(number)):
        raise click.BadParameter(f"{text!r} is not KEY=NUMBER, such as q_proj=4")
    return key, number


def whole(text: str) -> int:
    """A whole number.

    Raises:
        click.BadParameter: it is none.
    """
    if not text.isdecimal():
        raise click.BadParameter(f"{text} is not a whole number")
    return int(text)


def layers(_context: Any, _parameter: Any, text: str | None) -> tuple[int, ...] | None:
    """``0,2-4`` -> 0, 2, 3, 4."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        match = _SPAN.fullmatch(part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise click.BadParameter(f"{part!r} is not a layer or a span such as 4-7")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(found)


def names(_context: Any, _parameter: Any, text: str | None) -> tuple[str, ...] | None:
    """``a,b`` -> names."""
    return None if text is None else tuple(x.strip() for x in text.split(",") if x.strip())


def targets(context: Any, parameter: Any, text: str | None) -> str | tuple[str, ...] | None:
    """``a,b`` -> names; a text with regex signs, or ``all-linear``, stays one text."""
    if text == "all-linear" or _REGEX_SIGNS.search(text or ""):
        return text
    return names(context, parameter, text)
