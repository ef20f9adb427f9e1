"""Probes that go where users are, beyond short prompts in small batches.

Prompts of a few hundred tokens, a blend of three with a negative weight, sixteen rows some of which
rest while the others go on; and for ``full``, prompts up to the longest and long continuations.
Knows nothing of runtimes or PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lora_edge.parity.plan.states import (
    BASE,
    Kind,
    Probe,
    Row,
    State,
    label,
    only,
    prompts,
    reached,
)

Shaped = Callable[[int, int], Row | None]
"""A length and a seed -> a prompt of at most so many tokens in a chat's shape, if there is one."""

LONG = 400  # tokens of the long prompt: past a cache's first blocks, and most short windows
CROWD = 16
_LONGEST_WINDOW = 1024  # that the long prompt goes past, as long as it is affordable
_PAST_WINDOW = 24
_STEPS = 8  # decoded after a long prompt, and by blends and crowds
_WORTHWHILE = 2  # a long prompt is so many times as long as the short ones
_FIRST_OF_SWEEP = 128
_BEGINNING = 9  # tokens before a long continuation
_PAIR_LENGTHS = (19, 7)
_CROWD_LENGTHS = tuple(3 + 7 * i % CROWD for i in range(CROWD))  # no two alike
_RESTS = (0, 3, 0, 5)
_RESTED = 6  # steps from which on rows rest


@dataclass(frozen=True)
class Ground:
    """What the probes of one bundle have in common; the fields are arguments of ``plan``."""

    vocab_size: int
    max_length: int
    window: int | None
    seed: int
    reach: Mapping[str, Sequence[Row]]
    shaped: Shaped | None
    affordable: int | None
    adapters: Sequence[str]
    merged: bool
    decoded: int

    @property
    def few_steps(self) -> int:
        """What is decoded after these prompts."""
        return max(1, min(_STEPS, self.max_length // 2))

    @property
    def longest(self) -> int:
        """The longest prompt that a few steps may follow."""
        room = self.max_length - self.few_steps
        return max(1, room if self.affordable is None else min(room, self.affordable))

    def row(self, length: int, state: State, offset: int) -> Row:
        """A prompt of about that length, with all that the state's adapters wait for."""
        found = self.shaped(length, self.seed + offset) if self.shaped else None
        if found is None:
            (found,) = self.rows((length,), offset)
        return self.reaching(found, state)

    def rows(self, lengths: Sequence[int], offset: int) -> tuple[Row, ...]:
        """Random prompts that a few steps may follow."""
        longest = max(1, self.max_length - self.few_steps)
        return prompts(self.vocab_size, lengths, seed=self.seed + offset, longest=longest)

    def reaching(self, row: Row, state: State) -> Row:
        """The row with all that the state's adapters wait for."""
        return reached(row, self.needs(state))

    def needs(self, state: State) -> list[Row]:
        """Token sequences that the state's adapters wait for."""
        return [x for name, _ in state for x in self.reach.get(name, ())]


def longer(ground: Ground, who: str, kind: Kind, state: State, *, past: int) -> list[Probe]:
    """One row of a few hundred tokens, where the model has room for one that is worth its name.

    Args:
        ground: of the bundle.
        who: names the state.
        kind: of the state.
        state: what is active.
        past: length of the longest short prompt.
    """
    length = LONG
    if ground.window is not None and LONG <= ground.window <= _LONGEST_WINDOW:
        length = ground.window + _PAST_WINDOW
    length = min(length, ground.longest)
    if length < _WORTHWHILE * past:
        return []
    row = ground.row(length, state, 2)
    return [Probe(f"{who}, long prompt", kind, (row,), (state,), _STEPS, part="long")]


def sweep(
    ground: Ground, who: str, kind: Kind, state: State, *, past: int, only_last: bool
) -> list[Probe]:
    """One row each of 128, 256, 512 … tokens, up to the longest; ``only_last``: the longest."""
    lengths = []
    length = _FIRST_OF_SWEEP
    while length < ground.longest:
        lengths.append(length)
        length *= 2
    lengths.append(ground.longest)
    lengths = [x for x in lengths if x >= _WORTHWHILE * past]
    return [
        Probe(
            f"{who}, prompt of {length} tokens",
            kind,
            (ground.reaching(ground.rows((length,), 3)[0], state),),
            (state,),
            _STEPS,
            part=f"length-{length}",
        )
        for length in (lengths[-1:] if only_last else lengths)
    ]


def long_decode(ground: Ground, who: str, kind: Kind, state: State, *, past: int) -> list[Probe]:
    """One short prompt and a continuation longer than ``past``, where there is room for one."""
    waited = sum(map(len, ground.needs(state)))
    length = min(_BEGINNING + waited, max(1, ground.max_length // 2))
    steps = min(ground.decoded, ground.max_length - length)
    if steps <= past:
        return []
    row = ground.reaching(ground.rows((length,), 4)[0], state)
    name = f"{who}, {steps} tokens decoded"
    return [Probe(name, kind, (row,), (state,), steps, part=f"decode-{steps}")]


def pair(ground: Ground, blends: Sequence[State]) -> Probe:
    """Two rows of the second blend; of what cannot be blended, alone."""
    rows = ground.rows(_PAIR_LENGTHS, 5)
    steps = ground.few_steps if ground.decoded else 1
    if len(blends) > 1:
        state = blends[1]
        rows = tuple(ground.reaching(row, state) for row in rows)
        return Probe(f"blend {label(state)}", "blend", rows, (state, state), steps, part="pair")
    state, kind, who = _alone(ground)
    return Probe(f"{who}, batch of 2", kind, rows, (state, state), steps, part="pair")


def crowd(ground: Ground, blends: Sequence[State]) -> Probe:
    """Sixteen rows in as many states as there are; every other one rests for some steps."""
    steps = ground.few_steps if ground.decoded else 1
    rests = tuple(_RESTS[i % len(_RESTS)] for i in range(CROWD)) if steps >= _RESTED else ()
    rows = ground.rows(_CROWD_LENGTHS, 6)
    if ground.merged or not ground.adapters:
        state, kind, who = _alone(ground)
        name, states = f"{who}, batch of {CROWD}", (state,) * CROWD
    else:
        distinct = [*map(only, ground.adapters[: CROWD - 3]), BASE, *blends]
        kind, name = "mixed", f"mixed rows, {CROWD} of them"
        states = tuple(distinct[i % len(distinct)] for i in range(CROWD))
        rows = tuple(map(ground.reaching, rows, states))
    return Probe(name, kind, rows, states, steps, part="crowd", rests=rests)


def _alone(ground: Ground) -> tuple[State, Kind, str]:
    """The adapter that is in the weights, else the base."""
    if ground.merged:
        return only(ground.adapters[0]), "adapter", f"adapter {ground.adapters[0]}"
    return BASE, "base", "base"
