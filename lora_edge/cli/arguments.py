"""The values of options that several verbs share: text -> what is meant."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import click

_Value = TypeVar("_Value")


def named_options(pairs: Sequence[str]) -> dict[str, str]:
    """``K=V`` options as a mapping.

    Raises:
        click.BadParameter: an option is not of that form, or a key comes twice.
    """
    malformed = "--provider-option {!r} is not K=V"
    return _named(pairs, malformed, "--provider-option {}", empty=True)


def named_paths(pairs: Sequence[str]) -> dict[str, str]:
    """``NAME=DIR`` options as a mapping.

    Raises:
        click.BadParameter: an option is not of that form, or a name comes twice.
    """
    return _named(pairs, "{!r} is not NAME=DIR", "the adapter {!r}")


def optional_name(text: str) -> tuple[str | None, Path]:
    """``[NAME=]FILE`` as a name, or ``None``, and a path; a file of that whole name comes first."""
    name, separator, path = text.partition("=")
    if not separator or Path(text).exists():
        return None, Path(text)
    return name, Path(path)


def conversion_rank(text: str | None) -> int | float | None:
    """A rank, or a share between 0 and 1; ``None`` stays.

    Raises:
        click.BadParameter: it is neither.
    """
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise click.BadParameter(
        f"{text!r} is not a whole number from 1 on, or a share between 0 and 1"
    )


def weighted_names(pairs: Sequence[str]) -> dict[str, float] | None:
    """``NAME[=WEIGHT]`` options as a blend; ``None`` when there are none.

    Raises:
        click.BadParameter: a weight is not a finite number, or a name comes twice.
    """
    found: dict[str, float] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        try:
            weight = float(text) if separator else 1.0
        except ValueError:
            weight = math.nan
        if not name or not math.isfinite(weight):
            raise click.BadParameter(f"{pair!r} is not NAME or NAME=WEIGHT")
        _add(found, name, weight, f"the adapter {name!r}")
    return found or None


def _named(
    pairs: Sequence[str], malformed: str, what: str, *, empty: bool = False
) -> dict[str, str]:
    """Pairs as a mapping; with what is said of a bad one, and what a name is called."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not (name and separator and (value or empty)):
            raise click.BadParameter(malformed.format(pair))
        _add(found, name, value, what.format(name))
    return found


def _add(found: dict[str, _Value], key: str, value: _Value, what: str) -> None:
    if key in found:
        raise click.BadParameter(f"{what} is given twice")
    found[key] = value
