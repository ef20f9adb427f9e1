"""The graph with fixed shapes as a session of its own: what of the golden cases it has room for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from lora_edge.bundle.bundle import Bundle
from lora_edge.errors import DataError, OptionError
from lora_edge.parity.plan.plan import Depth
from lora_edge.parity.plan.states import State
from lora_edge.parity.record.golden import Golden, shortened
from lora_edge.runtime import Runner
from lora_edge.runtime.opening import runs_static

Run = tuple[str, str, bool | None]
"""A provider, a level of optimization, and whether its graph is the one with fixed shapes; None: as
the provider takes it."""


_STEPS = 16  # of a continuation


class Fit(NamedTuple):
    """What a session runs.

    Attributes:
        goldens: those that fit, as far as they fit.
        left_out: of those that do not, or not whole, the name and how much is left out.
    """

    goldens: list[Golden]
    left_out: tuple[str, ...]


def static_runs(bundle: Bundle, sessions: Sequence[tuple[str, str]]) -> list[Run]:
    """The sessions of a validation, and one on the graph with fixed shapes where none has it.

    Args:
        bundle: the bundle.
        sessions: providers and levels that were asked for.
    """
    runs: list[Run] = [(provider, level, None) for provider, level in sessions]
    has = any(part.static is not None for part in bundle.manifest.parts.values())
    on_cpu = next((level for provider, level in sessions if provider == "cpu"), None)
    if has and on_cpu is not None:
        runs.append(("cpu", on_cpu, True))
    return runs


def first_whole(bundle: Bundle, provider: str) -> None:
    """Check that the first session, which is compared with whole outputs, takes rows of any length.

    Raises:
        OptionError: it runs the graph with fixed shapes.
    """
    if runs_static(bundle, provider, None):
        raise OptionError(
            f"{provider} runs the graph with fixed shapes, and the first session is compared with "
            "PyTorch on rows of any length",
            f"Name cpu first: --provider cpu --provider {provider}.",
        )


def fitting(runner: Runner, goldens: Sequence[Golden], depth: Depth) -> Fit:
    """What of golden cases a session has room for: all, unless its graph has fixed shapes.

    Rows that are too long, and blends of too large a rank, are left out; continuations are cut. But
    for ``full`` they are short in any case: a step takes as long as a prompt.
    """
    room = runner.room
    if room is None:
        return Fit(list(goldens), ())
    found, left = [], []
    for golden in goldens:
        rows = [
            index
            for index, (row, state) in enumerate(
                zip(golden.probe.rows, golden.probe.states, strict=True)
            )
            if len(row) < room and _has_rank(runner, state)
        ]
        name, count = golden.probe.name, len(golden.probe.rows)
        if not rows:
            left.append(name)
            continue
        kept = golden if len(rows) == count else _only(golden, rows)
        if len(rows) < count:
            left.append(f"{name} ({count - len(rows)} of {count} rows)")
        kept = kept if depth == "full" else shortened(kept, _STEPS)
        longest = max(len(row) for row in kept.probe.rows)
        short = shortened(kept, room - longest)
        if short is not kept:
            steps = kept.probe.steps - short.probe.steps
            left.append(f"{name} (the last {steps} of {kept.probe.steps} steps)")
        found.append(short)
    return Fit(found, tuple(left))


def _has_rank(runner: Runner, state: State) -> bool:
    """Whether the graph has room for a row's adapters; one alone always fits."""
    if len(state) < 2:
        return True
    try:
        runner.binding(dict(state), 1)
    except DataError:
        return False
    return True


def _only(golden: Golden, rows: Sequence[int]) -> Golden:
    """The case with some of its rows."""
    probe = golden.probe
    return dataclasses.replace(
        golden,
        probe=dataclasses.replace(
            probe,
            rows=tuple(probe.rows[index] for index in rows),
            states=tuple(probe.states[index] for index in rows),
            rests=tuple(probe.rests[index] for index in rows) if probe.rests else (),
        ),
        tails=tuple(golden.tails[index] for index in rows),
        expected=tuple(golden.expected[index] for index in rows),
        observed=None,
    )
