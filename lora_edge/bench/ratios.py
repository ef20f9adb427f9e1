"""Ratios of what processes measured, their spread, and what they can resolve.

Knows numbers; knows nothing of processes or contestants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean, mean, stdev
from typing import Literal

Word = Literal["more", "less", "not resolved"]
Reached = Literal["reached", "missed", "not resolved"]

# Student's t for 95 %, both sides, by degrees of freedom from 1 on.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
_T_MANY = 2.145  # that of 14: a little wide for more


@dataclass(frozen=True)
class Ratio:
    """A ratio over several processes.

    Attributes:
        value: the geometric mean of the processes' ratios.
        low: lower end of its 95 % confidence interval (Student's t on the logarithms); ``None``
            for one process, which has no spread.
        high: upper end.
        smallest: the smallest process's ratio.
        largest: the largest.
        processes: how many.
    """

    value: float
    low: float | None
    high: float | None
    smallest: float
    largest: float
    processes: int


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Ratio of two figures that were measured in the same processes.

    Args:
        numerators: of each process, above 0.
        denominators: of the same processes, in the same order, above 0.

    Raises:
        ValueError: there are none, not as many of both, or one is not above 0.
    """
    if not numerators or len(numerators) != len(denominators):
        raise ValueError(f"{len(numerators)} and {len(denominators)} figures, expected as many")
    if min(*numerators, *denominators) <= 0:
        raise ValueError("a figure is not above 0")
    values = [a / b for a, b in zip(numerators, denominators, strict=True)]
    low = high = None
    centre = geometric_mean(values)
    if len(values) > 1:
        half = _half([math.log(value) for value in values])
        low, high = centre * math.exp(-half), centre * math.exp(half)
    return Ratio(centre, low, high, min(values), max(values), len(values))


def _half(logs: Sequence[float]) -> float:
    """Half of the confidence interval of their mean."""
    freedom = len(logs) - 1
    t = _T[freedom - 1] if freedom <= len(_T) else _T_MANY
    return t * stdev(logs, mean(logs)) / math.sqrt(len(logs))


def resolution(again: Ratio) -> float | None:
    """The smallest difference that can be told from none, as a share.

    Args:
        again: the reference's second entry over its first.

    Returns:
        How far from 1 that ratio's confidence interval reaches: ``0.03`` is 3 %; ``None`` for one
        process.
    """
    if again.low is None or again.high is None:
        return None
    return max(again.high, 1 / again.low) - 1


def interval(measured: Ratio, resolved: float | None) -> tuple[float, float] | None:
    """What a ratio can be: its own interval, or the resolution where that is wider.

    Args:
        measured: the ratio.
        resolved: of :func:`resolution`.

    Returns:
        Lowest and highest; ``None`` where nothing is known, as of one process.
    """
    if measured.low is None or measured.high is None or resolved is None:
        return None
    wide = 1 + resolved
    return min(measured.low, measured.value / wide), max(measured.high, measured.value * wide)


def compared(measured: Ratio, resolved: float | None) -> Word:
    """Whether a ratio is above 1, below 1, or cannot be told from 1."""
    ends = interval(measured, resolved)
    if ends is None or ends[0] <= 1 <= ends[1]:
        return "not resolved"
    return "more" if measured.value > 1 else "less"


def reached(measured: Ratio, resolved: float | None, target: float, *, least: bool) -> Reached:
    """Whether a ratio reaches a target.

    Args:
        measured: the ratio.
        resolved: of :func:`resolution`; 0 for figures that are counted and not measured.
        target: what is to be reached.
        least: the ratio is to be at least the target; else at most.
    """
    ends = interval(measured, resolved)
    if ends is None:
        return "not resolved"
    if ends[0] <= target <= ends[1] and ends[0] != ends[1]:
        return "not resolved"
    good = measured.value >= target if least else measured.value <= target
    return "reached" if good else "missed"
