"""What one rendering of a template has used, and what it may.

Knows the sizes of values; knows nothing of what makes them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jinja2.utils

SECONDS = 2.0
"""Processor time that a template may take."""
UNITS = 32_000_000
"""What a template may make: characters and, at 100 each, items; more where its input is large."""
STEPS = 500_000
"""Rounds of loops, calls, and values looked at."""
ITEM = 100
"""Units of an item, beside what is in it."""
BITS = 8_192
"""Of the largest whole number."""
_DEPTH = 200

_clock = getattr(time, "thread_time", time.process_time)
_meter: ContextVar[Meter | None] = ContextVar("meter", default=None)


class TemplateLimitError(Exception):
    """A template that takes more time or makes more text than it may."""


class Meter:
    """What one rendering has used.

    Args:
        units: what it may make.
    """

    def __init__(self, units: int = UNITS) -> None:
        self._units = units
        self._steps = STEPS
        self._end = _clock() + SECONDS

    def step(self, count: int = 1) -> None:
        """Count rounds, calls or values.

        Raises:
            TemplateLimitError: there were too many, or the time is over.
        """
        self._steps -= count
        if self._steps < 0:
            raise TemplateLimitError(f"it takes more than {STEPS:,} steps")
        if _clock() > self._end:
            raise TemplateLimitError(f"it takes more than {SECONDS:g} seconds")

    def room(self, units: int) -> None:
        """Raise unless so many units may still be made."""
        self.step()
        if units > self._units:
            raise TemplateLimitError("it makes too much text, or too long a list")

    def spend(self, units: int) -> None:
        """Count units that were made."""
        self.room(units)
        self._units -= units

    def size(self, value: Any) -> int:
        """Units of a value with everything in it, as often as it is in it; :meth:`room` for it."""
        if isinstance(value, str | bytes):
            self.room(len(value))
            return len(value) + ITEM
        total, stack = 0, [iter((value,))]
        while stack:
            for inner in stack[-1]:
                total += ITEM + (len(inner) if isinstance(inner, str | bytes) else 0)
                if total > self._units:
                    self.room(total)
                below = inside(inner)
                if below is not None:
                    if len(stack) > _DEPTH:
                        raise TemplateLimitError(f"a value is nested more than {_DEPTH} deep")
                    stack.append(below)
                    break
            else:
                stack.pop()
        self.step(total // ITEM)
        return total

    def made(self, value: Any) -> Any:
        """Count a result, and give it back."""
        if isinstance(value, str | bytes):
            self.spend(len(value))
        elif isinstance(value, list | tuple | dict):
            self.spend(ITEM * len(value))
        elif isinstance(value, int) and value.bit_length() > BITS:
            raise TemplateLimitError("it makes too large a number")
        return value


def inside(value: Any) -> Iterator[Any] | None:
    """What is in a value; None where it holds no others."""
    if isinstance(value, Mapping):
        return itertools.chain.from_iterable(value.items())
    if isinstance(value, _COLLECTIONS):
        items: Iterator[Any] = iter(value)
        return items
    if isinstance(value, jinja2.utils.Namespace):
        return itertools.chain.from_iterable(value._Namespace__attrs.items())
    return None


_VIEWS: tuple[type, ...] = type({}.keys()), type({}.values()), type({}.items())
_COLLECTIONS: tuple[type[Any], ...] = list, tuple, set, frozenset, *_VIEWS


@contextmanager
def metered(meter: Meter) -> Iterator[Meter]:
    """Count what the templates do that are compiled and rendered in the block."""
    token = _meter.set(meter)
    try:
        yield meter
    finally:
        _meter.reset(token)


def now() -> Meter:
    """The meter of the rendering that goes on."""
    meter = _meter.get()
    # Outside of a rendering nothing is owed, but nothing is free either.
    return Meter() if meter is None else meter
