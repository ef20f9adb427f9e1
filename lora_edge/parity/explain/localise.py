"""Where a bundle first differs from PyTorch: layer by layer, along the graph.

A row is run once in PyTorch, whose modules are listened to, and once in a copy of the graph that
gives the same layers' outputs. As elsewhere, a limit is a multiple of a measured floor: how far
PyTorch in float32 is from PyTorch in float64 at the same module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.maths.lora import FloatArray
from lora_edge.parity.case import Layer
from lora_edge.parity.compare import Tolerance
from lora_edge.parity.explain.rerun import alone, new_columns, rerun
from lora_edge.parity.plan.states import Probe, Row, schedule
from lora_edge.parity.record.golden import Golden
from lora_edge.parity.reference import LOGITS, Reference
from lora_edge.parity.subjects import subject_of
from lora_edge.parity.subjects.encoder import by_position
from lora_edge.runtime import Runner
from lora_edge.runtime.providers import open_like

Outputs = Mapping[str, NDArray[np.floating]]
"""Module path -> ``[positions, out]`` of one row; the graph's own output by ``LOGITS``."""

_EPSILON = float(np.finfo(np.float32).eps)  # agreement by luck is no floor
_BEYOND = 4


@dataclass(frozen=True)
class Divergence:
    """How far the layers are from PyTorch, on one row of a case that failed.

    Attributes:
        layers: every layer that was compared, in the order in which they run.
        first: module path of the first that is beyond its limit; ``None`` if none is.
        text: what was found, in a line.
        skipped: module paths that the graph shows and PyTorch does not, or in another shape.
    """

    layers: tuple[Layer, ...]
    first: str | None
    text: str
    skipped: tuple[str, ...] = ()

    @property
    def shown(self) -> tuple[Layer, ...]:
        """The layers up to the first that differs and a few beyond; all if none does."""
        paths = [layer.path for layer in self.layers]
        end = len(paths) if self.first is None else paths.index(self.first) + 1 + _BEYOND
        return self.layers[:end]


def localise(
    runner: Runner,
    reference: Reference,
    golden: Golden,
    row: int,
    tolerance: Tolerance | None = None,
) -> Divergence:
    """Find the first layer that differs on a row of a case that failed.

    The row is tried alone before its batch, and the prompt before the tokens that follow it, so
    that the text says what it takes for the difference to show.

    Args:
        runner: of the bundle.
        reference: the same base with the same adapters.
        golden: the case; its expected outputs are not read, so that a reduced one will do.
        row: which of its rows.
        tolerance: gives the multiple.
    """
    if not subject_of(runner.bundle.manifest).layered:
        return Divergence((), None, "the layers of an encoder-decoder are not compared")
    limits = tolerance or Tolerance()
    bench = _Bench(runner, reference, golden, row, limits.multiple)
    hidden, inner = False, None
    trials = [(alone(golden, row), 0, "")]
    if len(golden.probe.rows) > 1:
        trials.append((golden.probe, row, " when the row is in its batch"))
    for probe, index, where in trials:
        for tails, when in ((False, ""), (True, " in tokens that are fed one by one")):
            if tails and not golden.tails[row]:
                continue
            found = bench.compare(probe, index, tails=tails)
            if found.differs:
                return found.divergence(f"{when}{where}", bench.untold(found))
            if inner is None and any(map(_beyond, found.layers)):
                inner = found.divergence(f"{when}{where}", bench.untold(found))
            hidden = hidden or found.hidden
    if inner is not None and not hidden:
        return inner
    if hidden:
        said = "the difference does not show with intermediate outputs exposed"
    else:
        said = f"all {len(found.layers)} layers that were compared agree, and so do the outputs"
    return Divergence(found.layers, None, said, found.skipped)


@dataclass(frozen=True)
class _Comparison:
    """What one trial found; the outputs' own errors stand beside the layers'."""

    layers: tuple[Layer, ...]
    skipped: tuple[str, ...]
    exposed: Layer
    plain: Layer

    @property
    def differs(self) -> bool:
        return _beyond(self.exposed)

    @property
    def hidden(self) -> bool:
        return _beyond(self.plain) and not self.differs

    @property
    def first(self) -> Layer | None:
        """The first layer that differs."""
        return next((layer for layer in self.layers if _beyond(layer)), None)

    def divergence(self, when: str, untold: tuple[str, Sequence[str]]) -> Divergence:
        """What was found; ``untold``: of :meth:`_Bench.untold`."""
        first = self.first
        if first is None:
            said = (
                f"all {len(self.layers)} layers that were compared agree and the outputs do not "
                f"({_figures(self.exposed)}): the difference is behind "
                f"{self.layers[-1].path if self.layers else 'what can be compared'}"
            )
            return Divergence(self.layers, None, said + when, self.skipped)
        said = f"the first layer that differs is {first.path} ({_figures(first)})"
        last, modules = untold
        if modules:
            are = "are" if len(modules) > 1 else "is"
            said += (
                f", and it begins between {last} and there: {' and '.join(modules)} {are} not "
                "compared"
            )
        if not _beyond(self.exposed):
            said += "; the outputs agree"
        return Divergence(self.layers, first.path, said + when, self.skipped)


class _Bench:
    """One row of a golden case in PyTorch, and the graph with its layers exposed."""

    def __init__(
        self,
        runner: Runner,
        reference: Reference,
        golden: Golden,
        row: int,
        multiple: float,
    ) -> None:
        from lora_edge.graph.taps import tap

        self._runner = runner
        self._subject = subject_of(runner.bundle.manifest)
        self._golden = golden
        self._reference = reference
        self._row = row
        self._multiple = multiple
        self._output = self._subject.gives.output
        graph = tap(runner.bundle.directory / runner.graph_file)
        self._taps = graph.layers
        self._names = [self._output, *dict.fromkeys(x.value for x in graph.layers.values())]
        self._session = open_like(runner.session.session, graph.model, graph.folder)

    @cached_property
    def _expected(self) -> tuple[Outputs, Outputs]:
        """PyTorch's outputs in float32 and in float64."""
        narrow = self._ask()
        with self._reference.wide():
            return narrow, self._ask()

    def _ask(self) -> Outputs:
        probe = self._golden.probe
        row, state = probe.rows[self._row], probe.states[self._row]
        inputs = self._subject.inputs(row, self._golden.tails[self._row])
        found = self._reference.module_outputs(inputs, state, self._taps, len(row))
        return {path: by_position(values) for path, values in found.items()}

    def compare(self, probe: Probe, index: int, *, tails: bool) -> _Comparison:
        """Run a batch and compare one of its rows: its prompt, or what follows the prompt."""
        rows = [self._row] if len(probe.rows) == 1 else range(len(probe.rows))
        fed: list[Row] = [self._golden.tails[i] if tails else () for i in rows]
        length = len(probe.rows[index])
        parts: list[Outputs] = []
        steps = schedule(fed, probe.rests)

        def listen(run: int, values: Mapping[str, Any]) -> None:
            if run == 0 and not tails:
                parts.append(self._exposed(values, index, length))
            elif run > 0 and steps[run - 1][index] is not None:
                parts.append(self._exposed(values, index, 1))

        plain = rerun(self._runner, probe, fed, listen)[index]
        actual = {path: np.concatenate([part[path] for part in parts]) for path in parts[0]}
        # PyTorch has run the prompt and what follows it, if anything does, as one row.
        followed = bool(self._golden.tails[self._row])
        span = slice(length, None) if tails else slice(length if followed else None)
        return self._compared(actual, plain[span], span)

    def untold(self, found: _Comparison) -> tuple[str, list[str]]:
        """What runs right before the first layer that differs and is not compared.

        Returns:
            The last layer before it that is, and the modules with weights in between.
        """
        first = found.first
        if first is None:
            return "", []
        probe = self._golden.probe
        row, state = probe.rows[self._row], probe.states[self._row]
        order = self._reference.called(self._subject.inputs(row), state)
        compared = {layer.path for layer in found.layers}
        between: list[str] = []
        for path in reversed(order[: order.index(first.path)] if first.path in order else []):
            if path in compared:
                return path, between[::-1]
            between.append(path)
        return "the inputs", between[::-1]

    def _exposed(self, values: Mapping[str, Any], index: int, count: int) -> Outputs:
        names = ("input_ids", "attention_mask")
        feeds = {name: values[name].numpy() for name in names if name in values}
        columns = new_columns(feeds, index, count)
        tokens = feeds["input_ids"].shape if "input_ids" in feeds else (0, 0)
        got = self._session.run_with_ort_values(self._names, dict(values))
        arrays = {
            name: _own(value.numpy(), index, columns, tokens)
            for name, value in zip(self._names, got, strict=True)
        }
        found = {
            path: arrays[x.value][..., x.start : None if x.width is None else x.start + x.width]
            for path, x in self._taps.items()
        }
        return {**found, LOGITS: arrays[self._output]}

    def _compared(self, actual: Outputs, plain: FloatArray, span: slice) -> _Comparison:
        narrow, wide = ({path: x[span] for path, x in each.items()} for each in self._expected)
        layers, skipped = [], []
        for path in self._taps:
            if path in narrow and narrow[path].shape == actual[path].shape:
                layers.append(self._layer(path, actual[path], narrow[path], wide[path]))
            else:
                skipped.append(path)
        expected, exact = narrow[LOGITS], wide[LOGITS]
        # A batch's labels are as many as its largest task head's.
        exposed = actual[LOGITS][..., : expected.shape[-1]]
        return _Comparison(
            tuple(layers),
            tuple(skipped),
            self._layer(LOGITS, exposed, expected, exact),
            self._layer(LOGITS, plain, expected, exact),
        )

    def _layer(self, path: str, actual: Any, expected: Any, exact: Any) -> Layer:
        floor = max(_relative(exact, expected), _EPSILON)
        return Layer(path, _relative(actual, expected), floor, self._multiple * floor)


def _own(
    values: FloatArray, row: int, columns: slice | None, tokens: tuple[int, ...]
) -> FloatArray:
    """A row's own tokens of an output; of one that has no tokens, all that is the row's.

    Args:
        values: ``[batch | 1, seq, …]``, ``[batch * seq, …]`` or ``[batch, …]``.
        row: of the batch.
        columns: the row's tokens, of :func:`new_columns`.
        tokens: ``(batch, seq)``.
    """
    if values.ndim == 2 and len(values) == tokens[0] * tokens[1]:
        values = values.reshape(*tokens, -1)
    values = values[row if len(values) > 1 else 0]
    if values.ndim == 1:
        return values[None]
    return values[columns] if columns is not None and len(values) == tokens[1] else values


def _relative(values: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
    """``||y - y_ref|| / ||y_ref||``."""
    exact = expected.astype(np.float64)
    size = float(np.linalg.norm(exact))
    error = float(np.linalg.norm(values.astype(np.float64) - exact))
    return error / size if size else (0.0 if error == 0 else float("inf"))


def _beyond(layer: Layer) -> bool:
    return not layer.error <= layer.limit  # a NaN is beyond


def _figures(layer: Layer) -> str:
    return f"relative error {layer.error:.1e}, limit {layer.limit:.1e}"
