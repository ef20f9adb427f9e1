"""Checks of the arguments of public functions: a wrong type or value is an OptionError at once.

Python's own duck typing would refuse it too, but in the middle of the work and in the words of some
library. A bool is no number here, nor is 2.0 a whole one; numpy's scalars are numbers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from lora_edge.errors import OptionError

MOST_THREADS = max(256, 4 * (os.cpu_count() or 1))
"""Threads beyond this cannot be meant, and ONNX Runtime would start every one."""


def refused(name: str, value: object, expected: str, hint: str = "") -> OptionError:
    """The error of an argument that is not as expected."""
    return OptionError(
        f"{name} is {shown(value)}, expected {expected}",
        hint or f"Give {name} as the documentation of the function says.",
    )


def shown(value: object) -> str:
    """A value in an error's words: short, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  # a foreign object whose repr fails is named by its type
        text = ""
    return text if 0 < len(text) <= 80 and "\n" not in text else f"a {type(value).__name__}"


def whole(name: str, value: object, low: int, high: int | None = None) -> int:
    """A whole number from ``low`` on, up to ``high``."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise refused(name, value, "a whole number")
    if value < low or (high is not None and value > high):
        raise refused(name, value, f"{low} or more" if high is None else f"{low} to {high}")
    return int(value)


def number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number from ``low`` to ``high``."""
    if isinstance(value, bool | np.bool_) or not isinstance(
        value, int | float | np.integer | np.floating
    ):
        raise refused(name, value, "a number")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found) or not low <= found <= high:
        raise refused(name, value, "a finite number" if low == -math.inf else f"{low} or more")
    return found


def flag(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool | np.bool_):
        raise refused(name, value, "True or False")
    return bool(value)


def text(name: str, value: object) -> str:
    """A text."""
    if not isinstance(value, str):
        raise refused(name, value, "text")
    return value


def one_of(name: str, value: object, choices: Iterable[str]) -> str:
    """One of some words."""
    known = tuple(choices)
    if not isinstance(value, str) or value not in known:
        raise refused(name, value, f"one of {', '.join(known)}")
    return value


def texts(name: str, value: object) -> Sequence[str]:
    """Texts in a list or tuple; one text alone is a list of it."""
    if isinstance(value, str):
        return (value,)
    return tuple(text(f"an entry of {name}", each) for each in listed(name, value))


def listed(name: str, value: object) -> Sequence[Any]:
    """A list or another sequence, or an array; no text, and nothing that can be read only once."""
    if isinstance(value, np.ndarray) and value.ndim:
        return cast("Sequence[Any]", value)
    if isinstance(value, str | bytes | bytearray) or not isinstance(value, Sequence):
        raise refused(name, value, "a list")
    return value


def words(name: str, value: object) -> Collection[str]:
    """Texts in any collection but a text."""
    if isinstance(value, str | bytes) or not isinstance(value, Collection):
        raise refused(name, value, "a list of words")
    return [text(f"an entry of {name}", each) for each in value]


def path(name: str, value: object) -> str:
    """A path, as text."""
    found = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(found, str):
        raise refused(name, value, "a path")
    if not found or "\0" in found:
        raise refused(name, value, "a path that is not empty")
    return found


def paths(name: str, value: object) -> Mapping[str, str]:
    """name -> path."""
    if not isinstance(value, Mapping):
        raise refused(name, value, "a mapping of names to paths", "Like {'polite': 'folder'}.")
    return {
        text(f"a name in {name}", key): path(f"{name}[{key!r}]", each)
        for key, each in value.items()
    }


def pairs(name: str, value: object) -> Mapping[str, str]:
    """name -> text; numbers are written out."""
    if not isinstance(value, Mapping):
        raise refused(name, value, "a mapping of names to values", "Like {'device_id': '1'}.")
    for key, each in value.items():
        text(f"a name in {name}", key)
        if isinstance(each, bool) or not isinstance(each, str | int | float):
            raise refused(f"{name}[{key!r}]", each, "text or a number")
    return {key: str(each) for key, each in value.items()}


def called(name: str, value: object) -> None:
    """A function, or None."""
    if value is not None and not callable(value):
        raise refused(name, value, "a function or None")


def silent(line: str) -> None:
    """What progress is told to where the caller gave nothing."""
