"""Arguments that several verbs share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

import click

peft_files = click.option(
    "-a",
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=DIR",
    help="PEFT files of an adapter, where the bundle does not hold them. Repeatable.",
)


provider_options = click.option(
    "--provider-option",
    "provider_options",
    multiple=True,
    metavar="K=V",
    help="An option of the execution provider itself, such as device_id=1. Repeatable.",
)
allow_fallback = click.option(
    "--allow-fallback",
    is_flag=True,
    help="Let the CPU run what the provider does not take.  [default: refuse]",
)


def named_options(pairs: Sequence[str]) -> dict[str, str]:
    """``K=V`` options as a mapping.

    Raises:
        click.BadParameter: an option is not of that form, or a key comes twice.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not (key and separator):
            raise click.BadParameter(f"--provider-option {pair!r} is not K=V")
        if key in found:
            raise click.BadParameter(f"--provider-option {key} is given twice")
        found[key] = value
    return found


def named_paths(pairs: Sequence[str]) -> dict[str, str]:
    """``NAME=DIR`` options as a mapping.

    Raises:
        click.BadParameter: an option is not of that form, or a name comes twice.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        name, separator, path = pair.partition("=")
        if not (name and separator and path):
            raise click.BadParameter(f"{pair!r} is not NAME=DIR")
        if name in found:
            raise click.BadParameter(f"the adapter {name!r} is given twice")
        found[name] = path
    return found


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
        if name in found:
            raise click.BadParameter(f"the adapter {name!r} is given twice")
        found[name] = weight
    return found or None
