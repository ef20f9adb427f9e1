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
    state_of,
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
        return reached(found, self.needs(state))

    def rows(self, lengths: Sequence[int], offset: int) -> tuple[Row, ...]:
        """Random prompts that a few steps may follow."""
        longest = max(1, self.max_length - self.few_steps)
        return prompts(self.vocab_size, lengths, seed=self.seed + offset, longest=longest)

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
            ground.rows((length,), 3)
            if not state
            else (reached(ground.rows((length,), 3)[0], ground.needs(state)),),
            (state,),
            _STEPS,
            part=f"length-{length}",
        )
        for length in (lengths[-1:] if only_last else lengths)
    ]


def long_decode(
    ground: Ground, who: str, kind: Kind, state: State, steps: int, *, past: int
) -> list[Probe]:
    """One short prompt and a continuation longer than ``past``, where there is room for one."""
    needs = ground.needs(state)
    length = min(_BEGINNING + sum(map(len, needs)), max(1, ground.max_length // 2))
    steps = min(steps, ground.max_length - length)
    if steps <= past:
        return []
    row = reached(ground.rows((length,), 4)[0], needs)
    name = f"{who}, {steps} tokens decoded"
    return [Probe(name, kind, (row,), (state,), steps, part=f"decode-{steps}")]


def far_blend_of(adapters: Sequence[str]) -> State:
    """Three adapters, one with a negative weight; with fewer, as many as there are."""
    weights = {1: (-0.5,), 2: (0.8, -0.5)}.get(len(adapters), (0.6, -0.4, 0.5))
    return state_of(dict(zip(adapters, weights, strict=False)))


def pair(
    ground: Ground,
    adapters: Sequence[str],
    blends: Sequence[State],
    *,
    merged: bool,
    cached: bool,
) -> Probe:
    """Two rows of the second blend; of what cannot be blended, alone."""
    rows = ground.rows(_PAIR_LENGTHS, 5)
    steps = ground.few_steps if cached else 1
    if len(blends) > 1:
        state = blends[1]
        rows = tuple(reached(row, ground.needs(state)) for row in rows)
        return Probe(f"blend {label(state)}", "blend", rows, (state, state), steps, part="pair")
    state = only(adapters[0]) if merged else BASE
    kind, who = _alone(state)
    return Probe(f"{who}, batch of 2", kind, rows, (state, state), steps, part="pair")


def crowd(
    ground: Ground,
    adapters: Sequence[str],
    blends: Sequence[State],
    *,
    merged: bool,
    cached: bool,
) -> Probe:
    """Sixteen rows in as many states as there are; every other one rests for some steps."""
    steps = ground.few_steps if cached else 1
    rests = tuple(_RESTS[i % len(_RESTS)] for i in range(CROWD)) if steps >= _RESTED else ()
    rows = ground.rows(_CROWD_LENGTHS, 6)
    if merged or not adapters:
        state = only(adapters[0]) if merged else BASE
        kind, who = _alone(state)
        name, states = f"{who}, batch of {CROWD}", (state,) * CROWD
    else:
        distinct = [*map(only, adapters[: CROWD - 3]), BASE, *blends]
        kind, name = "mixed", f"mixed rows, {CROWD} of them"
        states = tuple(distinct[i % len(distinct)] for i in range(CROWD))
        rows = tuple(
            reached(row, ground.needs(state)) for row, state in zip(rows, states, strict=True)
        )
    return Probe(name, kind, rows, states, steps, part="crowd", rests=rests)


def _alone(state: State) -> tuple[Kind, str]:
    return ("adapter", f"adapter {state[0][0]}") if state else ("base", "base")
