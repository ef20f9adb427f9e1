"""A comparison that failed, and what can be asked about it; errors row by row. Pure numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from lora_edge.maths.lora import FloatArray
from lora_edge.parity.compare import Expected

Outputs = Sequence[FloatArray]
"""Logits ``[positions, vocab] float32`` of each row."""

Run = Callable[[Sequence[int]], Outputs]
"""Some of the rows, by index -> the logits of their prompts in another state."""

Scaled = Callable[[Sequence[int], float], Outputs]
"""The same with a factor."""


@dataclass(frozen=True)
class Failure:
    """A comparison that failed.

    Attributes:
        rows: token ids of each row, prompt and continuation.
        prompts: how many positions of each row come before its continuation.
        expected: what the reference gave for each row.
        actual: what the bundle gave, the whole vocabulary.
        limit: of a logit's error; anything within it is right.
        padded: which rows are shorter than the longest of the batch.
        of_mixed: it is one row of a mixed batch.
        causal: a position sees those before it only.
        headed: the base of the expected outputs has the adapter's own task head.
        marks: token sequences without which the adapter changes nothing, or not all.
        invoked: it is active from its one mark on, and not before.
        rested: some rows of the batch rested for some steps.
    """

    rows: Sequence[tuple[int, ...]]
    prompts: Sequence[int]
    expected: Sequence[Expected]
    actual: Outputs
    limit: float
    padded: Sequence[bool]
    of_mixed: bool = False
    causal: bool = True
    headed: bool = False
    marks: Sequence[tuple[int, ...]] = ()
    invoked: bool = False
    rested: bool = False

    @property
    def has_effect(self) -> bool:
        """An adapter is active in it."""
        return any(row.base is not None for row in self.expected)

    def first_wrong(self) -> list[int | None]:
        """The first position of each row that is wrong; None where none is."""
        found: list[int | None] = []
        for row, errors in zip(self.expected, errors_of(self.expected, self.actual), strict=True):
            wrong = np.flatnonzero(~(errors <= self.limit))
            found.append(place_of(row, int(wrong[0])) if wrong.size else None)
        return found

    def wrong_prompts(self) -> list[int]:
        """Rows whose prompt is wrong somewhere, the shortest first."""
        first = enumerate(self.first_wrong())
        wrong = [i for i, place in first if place is not None and place < self.prompts[i]]
        return sorted(wrong, key=lambda index: self.prompts[index])

    def first_mark(self, index: int) -> int | None:
        """Where the adapter begins to act on a row: its last invocation, or first trained token."""
        row = self.rows[index]
        if self.invoked:
            row = row[: self.prompts[index]]
        places = [
            start
            for mark in self.marks
            for start in range(len(row) - len(mark) + 1)
            if tuple(row[start : start + len(mark)]) == tuple(mark)
        ]
        if not places:
            return None
        return max(places) if self.invoked else min(places)

    def like_base(self, index: int, start: int) -> int:
        """For how many positions from ``start`` on the outputs are the base's."""
        row = of_base(self.expected[index])
        (errors,) = errors_of([row], [self.actual[index]])
        wrong = [place_of(row, int(i)) for i in np.flatnonzero(~(errors <= self.limit))]
        return min((x for x in wrong if x >= start), default=row.length) - start


class Bench(Protocol):
    """Runs the failed batch again, in other ways."""

    def off(self) -> tuple[Outputs, Bench] | None:
        """The outputs without adapters, and the same bench without; None where it cannot be."""

    def alone(self) -> Outputs | None:
        """Each row in a batch of its own; None where there was one row only."""

    def alike(self) -> Outputs | None:
        """A row of a mixed batch, with its own adapter on all rows; None for other batches."""

    @property
    def batch(self) -> int:
        """Number of rows of the batch."""

    def awake(self) -> Outputs | None:
        """The batch as it was, as far as no row rests or has ended; None where none did."""

    def copies(self, row: int, count: int) -> Outputs:
        """One of the rows so many times, as one batch."""

    def at_once(self) -> Outputs | None:
        """Each row alone, its continuation as part of the prompt; None without a cache."""

    def lookalikes(self) -> Iterator[tuple[str, Run]]:
        """What it does if its outputs are these, and the run that gives them."""

    def leaks(self) -> Iterator[tuple[str, Scaled]]:
        """Of a row in a mixed batch: another row's state, and the run with a share of it added."""

    def remedies(self) -> Iterator[tuple[str, Run]]:
        """What is wrong if this run is right."""

    def scaled(self) -> Iterator[tuple[str, int, Scaled]]:
        """An adapter, its rank, and the run with its B multiplied."""

    def findings(self) -> str:
        """What the adapters' files show by themselves; empty: nothing."""


def of_base(row: Expected) -> Expected:
    """What is expected without the adapter."""
    return replace(row, reference=row.reference if row.base is None else row.base, base=None)


def place_of(row: Expected, index: int) -> int:
    """The row's position of what is kept ``index``-th."""
    return index if row.places is None else int(row.places[index])


def kept(row: Expected, logits: FloatArray) -> FloatArray:
    """What the expectation has of the bundle's logits, which may end before the row does."""
    there = row.first(len(logits))
    own = there.of(logits)
    if there.columns is None:
        return own
    return np.take_along_axis(own, there.columns, axis=-1)


def errors_of(expected: Sequence[Expected], outputs: Outputs) -> list[FloatArray]:
    """The largest error at each position that is kept, of as many as the outputs have."""
    return [
        np.abs(kept(row, x) - row.first(len(x)).reference).max(-1)
        for row, x in zip(expected, outputs, strict=True)
    ]


def within(errors: Sequence[FloatArray], limit: float) -> bool:
    """Every error is within the limit; NaN is not."""
    return all(bool((row <= limit).all()) for row in errors)


def largest(errors: Sequence[FloatArray]) -> str:
    """The largest error, in words."""
    worst = max(float(row.max()) for row in errors)
    return f"off by {worst:.1e}" if math.isfinite(worst) else "NaN or Inf"
