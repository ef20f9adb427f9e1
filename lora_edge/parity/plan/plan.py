"""Which probes a bundle is checked with: the base, each adapter, blends, mixed batches.

Knows nothing of runtimes or PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lora_edge.parity.plan.far import Ground, Shaped, crowd, long_decode, longer, pair
from lora_edge.parity.plan.far import sweep as sweep_of
from lora_edge.parity.plan.states import BASE, Probe, Row, State, label, only, prompts, state_of

Depth = Literal["quick", "normal", "full"]

MIXED_ROWS = 8
_LENGTHS = (5, 24, 9, 17)
_MIXED_LENGTHS = (6, 17, 11, 5, 21, 13, 8, 19)
_LONGEST_WINDOW = 128  # a window up to this is crossed by every state, a longer one by long prompts


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
    depth: Depth = "normal",
    merged: bool = False,
    shaped: Shaped | None = None,
    affordable: int | None = None,
    everyone: bool = True,
    decoded: int = 0,
) -> tuple[Probe, ...]:
    """The probes of a bundle.

    Short prompts for the base, each adapter, a blend and mixed batches; then, but for ``quick``,
    what users do besides: a prompt of a few hundred tokens, a blend of three with a negative
    weight, sixteen rows some of which rest; and in ``full`` prompts up to the longest, and long
    continuations.

    Args:
        adapters: names of the bundle's adapters.
        blendable: those of them that may be blended and weighted; all when omitted.
        reach: adapter -> token sequences without which it changes nothing, or not all that it
            changes (an aLoRA's invocation, trained tokens).
        vocab_size: of the model.
        max_length: positions that the model has; prompt and steps stay within it.
        steps: tokens decoded after each short prompt.
        window: the model's shortest attention window, if any.
        seed: of the random prompts.
        given: the user's own prompts as token ids, used before random ones.
        depth: how far the plan goes.
        merged: the one adapter is in the weights: there is no base, no blend and no mixed batch.
        shaped: a length and a seed -> a prompt of about so many tokens in the shape that the model
            was trained on; ``None``: random tokens.
        affordable: tokens beyond which a long row costs too much; ``None``: none does.
        everyone: each adapter gets a long prompt; else the base and the first adapter.
        decoded: steps of a long continuation in ``full``; 0: there is no cache, and no row rests.
    """
    steps = max(1, min(steps, max_length // 2))
    longest = max(1, max_length - steps)
    rows = prompts(vocab_size, lengths_for(window), seed=seed, longest=longest, given=given)
    wanted = reach or {}
    free = adapters if blendable is None else blendable
    ground = Ground(
        vocab_size, max_length, window, seed, wanted, shaped, affordable, adapters, merged, decoded
    )
    far, full = depth != "quick", depth == "full"

    def around(kind: Literal["base", "adapter"], state: State, own: Sequence[Row]) -> list[Probe]:
        who = f"adapter {state[0][0]}" if state else "base"
        found = [Probe(who, kind, tuple(own), (state,) * len(own), steps)]
        first = not state or state == only(adapters[0])
        if far and (everyone or first or full):
            found += longer(ground, who, kind, state, past=max(map(len, rows)))
        if full:
            found += sweep_of(
                ground, who, kind, state, past=max(map(len, rows)), only_last=not first
            )
            found += long_decode(ground, who, kind, state, past=steps)
        return found

    probes = around("base", BASE, rows)
    for name in adapters:
        # The first row stays without: an aLoRA that is not invoked must change nothing.
        own = [rows[0], *(ground.reaching(row, only(name)) for row in rows[1:])]
        probes += around("adapter", only(name), own)
    blends: list[State] = []
    if free and not merged:
        blends = [blend_of(free)]
        states = (blends[0],) * len(rows)
        probes.append(Probe(f"blend {label(blends[0])}", "blend", rows, states, steps))
    if adapters and not merged:
        mixed = prompts(vocab_size, _MIXED_LENGTHS, seed=seed + 1, longest=longest)
        for batch, start in enumerate(range(0, len(adapters), MIXED_ROWS - 2), 1):
            active = adapters[start : start + MIXED_ROWS - 2]
            distinct = [*map(only, active), BASE, *blends]
            states = tuple(distinct[i % len(distinct)] for i in range(MIXED_ROWS))
            filled = tuple(map(ground.reaching, mixed, states))
            name = "mixed rows" if batch == 1 else f"mixed rows of batch {batch}"
            probes.append(Probe(name, "mixed", filled, states, steps, batch=batch))
    if far:
        if blends:
            blends.append(far_blend_of(free))
        probes += [pair(ground, blends), crowd(ground, blends)]
    return tuple(probes)


def blend_of(adapters: Sequence[str]) -> State:
    """The first blend: the first two adapters, or the only one at half weight."""
    if len(adapters) == 1:
        return ((adapters[0], 0.5),)
    return state_of({adapters[0]: 0.7, adapters[1]: 0.3})


def far_blend_of(adapters: Sequence[str]) -> State:
    """Three adapters, one with a negative weight; with fewer, as many as there are."""
    weights = {1: (-0.5,), 2: (0.8, -0.5)}.get(len(adapters), (0.6, -0.4, 0.5))
    return state_of(dict(zip(adapters, weights, strict=False)))


def lengths_for(window: int | None) -> tuple[int, ...]:
    """Prompt lengths: unequal, one past a short attention window, one that decode carries past."""
    if window is None or window > _LONGEST_WINDOW:
        return _LENGTHS
    return (_LENGTHS[0], window + 3, max(2, window - 3), *_LENGTHS[3:])


def shortest_window(config: Mapping[str, Any]) -> int | None:
    """The attention window of a ``config.json``, if any layer has one."""
    text = config.get("text_config", config)
    window = text.get("sliding_window")
    used = text.get("use_sliding_window", True)
    return int(window) if isinstance(window, int) and window > 0 and used else None
