"""One batch that is checked: prompts, adapter states, decode steps.

A :class:`Probe` is one batch run through the graph; it does not depend on where the expected
outputs come from. Knows nothing of runtimes or PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

State = tuple[tuple[str, float], ...]
"""What is active on a row: ``()`` the base, ``(("a", 1.0),)`` one adapter, longer: a blend."""

Inputs = Mapping[str, NDArray[Any]]
"""One row's inputs by name, without the batch's axis: ``[seq] int64``, or images or speech."""

Kind = Literal["base", "adapter", "blend", "mixed"]
Row = tuple[int, ...]

BASE: State = ()
_BEFORE_REST = 2  # tokens that a row is fed before it rests


@dataclass(frozen=True)
class Probe:
    """One batch: rows of token ids, what is active on each row, how many tokens follow.

    Attributes:
        name: unique among the probes, e.g. ``adapter polite``.
        kind: what it exercises.
        rows: prompts, unpadded.
        states: what is active on each row; all the same except in a mixed batch.
        steps: number of tokens decoded after the prompt.
        given: the prompts are the user's own, kept in the bundle.
        batch: counts the batches of one kind, where one cannot hold all adapters.
        part: what it reaches beyond the probes of its kind, e.g. ``long``; empty: it is one of
            those.
        rests: for how many decode steps each row rests, after its second; empty: none does.
    """

    name: str
    kind: Kind
    rows: tuple[Row, ...]
    states: tuple[State, ...]
    steps: int
    given: bool = False
    batch: int = 1
    part: str = ""
    rests: tuple[int, ...] = ()

    @property
    def kept(self) -> bool:
        """It is among the golden cases that a bundle carries; those of ``full`` alone are not."""
        return not self.part.startswith(("length-", "decode-"))

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are active somewhere in the batch, sorted."""
        return tuple(sorted({name for state in self.states for name, _ in state}))

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {
            "name": self.name,
            "kind": self.kind,
            "rows": [list(row) for row in self.rows],
            "states": [[list(part) for part in state] for state in self.states],
            "steps": self.steps,
            "given": self.given,
            "batch": self.batch,
            "part": self.part,
            "rests": list(self.rests),
        }


def schedule(tails: Sequence[Row], rests: Sequence[int] = ()) -> list[tuple[int | None, ...]]:
    """The token of each row at each decode step; ``None`` where the row rests, or has ended.

    Args:
        tails: the tokens of each row, which may be of unequal number.
        rests: for how many steps each row rests after its second; empty: none does.
    """
    fed: list[list[int | None]] = []
    for tail, rest in zip(tails, rests or [0] * len(tails), strict=True):
        pause: list[None] = [None] * (rest if len(tail) > _BEFORE_REST else 0)
        fed.append([*tail[:_BEFORE_REST], *pause, *tail[_BEFORE_REST:]])
    longest = max(map(len, fed), default=0)
    steps = zip(*([*row, *[None] * (longest - len(row))] for row in fed), strict=True)
    return [step for step in steps if any(token is not None for token in step)]


def label(state: State) -> str:
    """``base``, ``polite`` or ``0.7 polite - 0.3 terse``."""
    if not state:
        return "base"
    if len(state) == 1 and state[0][1] == 1.0:
        return state[0][0]
    (first, weight), *others = state
    terms = [f"{weight:g} {first}"]
    terms += [f"{'-' if w < 0 else '+'} {abs(w):g} {name}" for name, w in others]
    return " ".join(terms)


def state_of(adapter: str | Mapping[str, float] | None) -> State:
    """The state that the runtime's ``adapter=`` argument means for one row."""
    if adapter is None:
        return BASE
    if isinstance(adapter, str):
        return only(adapter)
    return tuple(sorted((name, float(weight)) for name, weight in adapter.items()))


def only(name: str) -> State:
    """The state in which one adapter is active at weight 1."""
    return ((name, 1.0),)


def prompts(
    vocab_size: int,
    lengths: Sequence[int],
    *,
    seed: int,
    longest: int,
    given: Sequence[Row] = (),
) -> tuple[Row, ...]:
    """Token ids: the given rows first, then seeded random ones of these lengths.

    Args:
        vocab_size: ids are below it.
        lengths: one row each; the first ``len(given)`` are replaced by the given rows.
        seed: of the random rows.
        longest: every row is cut to this many tokens.
        given: rows of the user's own.
    """
    random = np.random.default_rng(seed)
    rows = [
        tuple(int(token) for token in random.integers(0, vocab_size, length)) for length in lengths
    ]
    rows[: len(given)] = [tuple(row) for row in given]
    return tuple(row[:longest] for row in rows)


def reached(row: Row, sequences: Sequence[Row]) -> Row:
    """The row with token sequences written into it, one after the other, from a third on."""
    written = [token for sequence in sequences for token in sequence]
    start = max(0, min(len(row) // 3, len(row) - len(written)))
    return (*row[:start], *written, *row[start + len(written) :])
