"""The matrix of what is checked: prompts, adapter states, decode steps.

A :class:`Probe` is one batch run through the graph; it does not depend on where the expected
outputs come from. Knows nothing of runtimes or PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

State = tuple[tuple[str, float], ...]
"""What is active on a row: ``()`` the base, ``(("a", 1.0),)`` one adapter, longer: a blend."""

Kind = Literal["base", "adapter", "blend", "mixed"]
Row = tuple[int, ...]

BASE: State = ()
MIXED_ROWS = 8
_LENGTHS = (5, 24, 9, 17)
_MIXED_LENGTHS = (6, 17, 11, 5, 21, 13, 8, 19)
_LONGEST_WINDOW = 128  # a window up to this is crossed here too, not in the base check alone


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
    """

    name: str
    kind: Kind
    rows: tuple[Row, ...]
    states: tuple[State, ...]
    steps: int
    given: bool = False
    batch: int = 1

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
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Probe:
        """The inverse of :meth:`to_json`."""
        return Probe(
            str(data["name"]),
            data["kind"],
            tuple(tuple(int(token) for token in row) for row in data["rows"]),
            tuple(tuple((str(n), float(w)) for n, w in state) for state in data["states"]),
            int(data["steps"]),
            bool(data.get("given", False)),
            int(data.get("batch", 1)),
        )


def label(state: State) -> str:
    """``base``, ``polite`` or ``0.7 polite + 0.3 terse``."""
    if not state:
        return "base"
    if len(state) == 1 and state[0][1] == 1.0:
        return state[0][0]
    return " + ".join(f"{weight:g} {name}" for name, weight in state)


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


def blend_of(adapters: Sequence[str]) -> State:
    """The blend that is checked: the first two adapters, or the only one at half weight."""
    if len(adapters) == 1:
        return ((adapters[0], 0.5),)
    return state_of({adapters[0]: 0.7, adapters[1]: 0.3})


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


def lengths_for(window: int | None) -> tuple[int, ...]:
    """Prompt lengths: unequal, one past a short attention window, one that decode carries past."""
    if window is None or window > _LONGEST_WINDOW:
        return _LENGTHS
    return (_LENGTHS[0], window + 3, max(2, window - 3), *_LENGTHS[3:])


def plan(
    adapters: Sequence[str],
    *,
    vocab_size: int,
    max_length: int,
    steps: int,
    window: int | None = None,
    seed: int = 0,
    given: Sequence[Row] = (),
    blendable: Sequence[str] | None = None,
    reach: Mapping[str, Sequence[Row]] | None = None,
) -> tuple[Probe, ...]:
    """The probes of a switchable bundle: the base, each adapter, a blend, a mixed batch.

    Args:
        adapters: names of the bundle's adapters.
        blendable: those of them that may be blended and weighted; all when omitted.
        reach: adapter -> token sequences without which it changes nothing, or not all that it
            changes (an aLoRA's invocation, trained tokens).
        vocab_size: of the model.
        max_length: positions that the model has; prompt and steps stay within it.
        steps: tokens decoded after each prompt.
        window: the model's shortest attention window, if any.
        seed: of the random prompts.
        given: the user's own prompts as token ids, used before random ones.
    """
    steps = max(1, min(steps, max_length // 2))
    longest = max(1, max_length - steps)
    rows = prompts(vocab_size, lengths_for(window), seed=seed, longest=longest, given=given)
    probes = [Probe("base", "base", rows, (BASE,) * len(rows), steps)]
    wanted = reach or {}
    for name in adapters:
        # The first row stays without: an aLoRA that is not invoked must change nothing.
        reaching = [
            row if not i else reached(row, wanted.get(name, ())) for i, row in enumerate(rows)
        ]
        probes.append(adapter_probe(name, tuple(reaching), steps))
    if adapters:
        free = adapters if blendable is None else blendable
        blend = blend_of(free) if free else None
        if blend:
            name = f"blend {label(blend)}"
            probes.append(Probe(name, "blend", rows, (blend,) * len(rows), steps))
        mixed = prompts(vocab_size, _MIXED_LENGTHS, seed=seed + 1, longest=longest)
        for batch, start in enumerate(range(0, len(adapters), MIXED_ROWS - 2), 1):
            states = _mixed_states(adapters[start : start + MIXED_ROWS - 2], blend)
            own = [
                reached(row, [x for name, _ in state for x in wanted.get(name, ())])
                for row, state in zip(mixed, states, strict=True)
            ]
            name = "mixed rows" if batch == 1 else f"mixed rows of batch {batch}"
            probes.append(Probe(name, "mixed", tuple(own), states, steps, batch=batch))
    return tuple(probes)


def reached(row: Row, sequences: Sequence[Row]) -> Row:
    """The row with token sequences written into it, one after the other, from a third on."""
    written = [token for sequence in sequences for token in sequence]
    start = max(0, min(len(row) // 3, len(row) - len(written)))
    return (*row[:start], *written, *row[start + len(written) :])


def adapter_probe(name: str, rows: tuple[Row, ...], steps: int) -> Probe:
    """One adapter at weight 1 on every row."""
    return Probe(f"adapter {name}", "adapter", rows, (only(name),) * len(rows), steps)


def _mixed_states(adapters: Sequence[str], blend: State | None) -> tuple[State, ...]:
    distinct = [*map(only, adapters), BASE, *([blend] if blend else [])]
    return tuple(distinct[i % len(distinct)] for i in range(MIXED_ROWS))
