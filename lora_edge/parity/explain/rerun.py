"""Running a golden case again, and seeing what the graph is fed while it runs.

Knows bundles and runtimes; knows nothing of PyTorch.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.maths.lora import FloatArray
from lora_edge.parity.plan.states import Probe, Row, schedule
from lora_edge.parity.record.golden import Golden
from lora_edge.parity.subjects import subject_of
from lora_edge.runtime import Runner

Listener = Callable[[int, Mapping[str, Any]], None]
"""Called before each run of the graph: which run it is, and graph input name -> OrtValue."""


def alone(golden: Golden, row: int) -> Probe:
    """A probe of one row of a golden case."""
    probe = golden.probe
    kind = probe.kind if probe.kind != "mixed" else "adapter"
    return dataclasses.replace(
        probe, kind=kind, rows=(probe.rows[row],), states=(probe.states[row],), rests=()
    )


def rerun(
    runner: Runner, probe: Probe, tails: Sequence[Row], listener: Listener | None = None
) -> list[FloatArray]:
    """The bundle's outputs ``[positions, columns]`` of each row, prompt and tail.

    The prompts are one run of the graph, each decode step another (see :func:`run_of`).

    Args:
        runner: of a bundle of one graph.
        probe: the batch.
        tails: the continuation of each row; empty: the prompts alone.
        listener: told of each run.
    """
    with _told(runner, listener) if listener is not None else contextlib.nullcontext():
        return subject_of(runner.bundle.manifest).observe(runner, probe, tails)


def run_of(probe: Probe, tails: Sequence[Row], row: int, token: int) -> int:
    """Which run of the graph a token of a row's tail is fed in; the prompt's is 0."""
    steps = [step for step, fed in enumerate(schedule(tails, probe.rests)) if fed[row] is not None]
    return steps[token] + 1


def new_columns(feeds: Mapping[str, NDArray[Any]], row: int, count: int) -> slice | None:
    """Which columns of a run's outputs are a row's last ``count`` new tokens.

    Args:
        feeds: ``input_ids [batch, width]`` and ``attention_mask [batch, total]``, if it has them.
        row: of the batch.
        count: of its new tokens.

    Returns:
        ``None`` where the outputs are not by token (images).
    """
    if "input_ids" not in feeds or "attention_mask" not in feeds:
        return None
    width = feeds["input_ids"].shape[1]
    if width == 1:
        return slice(0, 1)
    new = np.flatnonzero(feeds["attention_mask"][row, -width:])
    return slice(int(new[-1]) + 1 - count, int(new[-1]) + 1)


@contextlib.contextmanager
def _told(runner: Runner, listener: Listener) -> Iterator[None]:
    """Let a listener stand between the runner and its session."""
    session = runner.session.session
    runner.session.session = _Watched(session, listener)
    try:
        yield
    finally:
        runner.session.session = session


class _Watched:
    """A session that tells of each run."""

    def __init__(self, session: Any, listener: Listener) -> None:
        self._session = session
        self._listener = listener
        self._runs = 0

    def io_binding(self) -> _WatchedBinding:
        return _WatchedBinding(self._session.io_binding())

    def run_with_iobinding(self, io: _WatchedBinding) -> None:
        self._listener(self._runs, io.values)
        self._runs += 1
        self._session.run_with_iobinding(io.binding)


class _WatchedBinding:
    """An IO binding that keeps the inputs bound to it."""

    def __init__(self, binding: Any) -> None:
        self.binding = binding
        self.values: dict[str, Any] = {}

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.values[name] = value
        self.binding.bind_ortvalue_input(name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.binding, name)
