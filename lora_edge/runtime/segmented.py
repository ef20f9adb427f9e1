"""A graph that runs in parts, one after the other, whose weights are in memory in turns.

Each part is a session of ONNX Runtime's CPU provider on the same data file, which it maps and does
not pack; what a part has read is given back when it has run, but for the first parts. The parts
together give what the whole graph gives. Slower than a session on the whole: for checks of graphs
that are larger than memory should hold, not for use. Knows graphs and values; knows nothing of
bundles or adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Protocol

import onnxruntime as ort
from numpy.typing import NDArray

from lora_edge.errors import BundleError
from lora_edge.files.pages import MappedFiles
from lora_edge.runtime.providers import DATA_FOLDER, session_options

_SETTINGS = {
    "session.disable_prepacking": "1",  # weights stay where the data file is mapped
    "session.intra_op.allow_spinning": "0",  # each part has threads of its own
}

_KEPT = 128 << 20  # bytes of the first parts' weights, which are given back when others need room
_COPIES = ["ConstantFolding"]  # which makes a turned weight that is not the mapped one


class Part(Protocol):
    """Some nodes of a graph."""

    @property
    def reads(self) -> Sequence[str]:
        """What it reads that an earlier part gives."""

    @property
    def gives(self) -> Sequence[str]:
        """What it gives to later ones, and which of the graph's outputs."""

    @property
    def ends(self) -> Sequence[str]:
        """Those of them that are the graph's outputs."""

    @property
    def size(self) -> int:
        """Bytes of the weights that it reads."""

    def model(self, types: Mapping[str, str]) -> bytes:
        """As a model of its own, ``types`` being those of what it reads."""


Cut = Callable[[Path], Sequence[Part]]
"""Cuts the graph of a file into parts."""


class SegmentedSession:
    """As much of an ``onnxruntime.InferenceSession`` as a decoder and an encoder use.

    Args:
        graph: the whole graph's file, beside which its data is.
        parts: of the graph, in order.
        level: of ONNX Runtime's optimizations of each part.
        threads: intra-op threads; None leaves it to ONNX Runtime.

    Raises:
        BundleError: ONNX Runtime cannot load a part.
    """

    def __init__(self, graph: Path, parts: Sequence[Part], level: str, threads: int | None) -> None:
        self.parts = parts
        self.sessions: list[Any] = []
        types: dict[str, str] = {}
        inputs: dict[str, Any] = {}
        outputs: dict[str, Any] = {}
        data = [x for x in graph.parent.iterdir() if x != graph]
        self.files: list[MappedFiles] = []  # what each part has mapped
        known, kept = MappedFiles(data), 0
        settings = {**_SETTINGS, DATA_FOLDER: str(graph.parent)}
        for part in parts:
            options = session_options(level, threads, None, settings)
            options.enable_cpu_mem_arena = False
            try:
                session = ort.InferenceSession(
                    part.model(types),
                    options,
                    providers=["CPUExecutionProvider"],
                    disabled_optimizers=_COPIES,
                )
            except Exception as error:  # onnxruntime's exceptions share no base class of their own
                said = next(iter(str(error).strip().splitlines()), "")
                raise BundleError(
                    f"{graph} cannot be loaded: {said}", "Export it again."
                ) from error
            inputs |= {x.name: x for x in session.get_inputs() if x.name not in part.reads}
            made = {x.name: x for x in session.get_outputs()}
            types |= {name: x.type for name, x in made.items()}
            outputs |= {name: made[name] for name in part.ends}
            self.sessions.append(session)
            now = MappedFiles(data)
            self.files.append(now.without(known))
            known = now
        self._inputs, self._outputs = inputs, outputs
        self.kept = 0  # of the parts, so many stay in memory from run to run
        while self.kept < len(parts) and kept + parts[self.kept].size <= _KEPT:
            kept += parts[self.kept].size
            self.kept += 1
        self.let_go()

    def let_go(self) -> None:
        """Give back the memory of all weights, which are read again by the next run."""
        for own in self.files:
            own.give_all_back()

    def get_inputs(self) -> list[Any]:
        """The graph's inputs, those of all parts."""
        return list(self._inputs.values())

    def get_outputs(self) -> list[Any]:
        """The graph's outputs."""
        return list(self._outputs.values())

    def get_provider_graph_assignment_info(self) -> list[Any]:
        """Which provider runs which nodes."""
        return [x for own in self.sessions for x in own.get_provider_graph_assignment_info()]

    def get_session_options(self) -> Any:
        """The options of a part, those of all of them."""
        return self.sessions[0].get_session_options()

    def get_providers(self) -> list[str]:
        """The CPU's."""
        return list(self.sessions[0].get_providers())

    def get_provider_options(self) -> dict[str, Any]:
        """Of the CPU's provider, which has none."""
        return dict(self.sessions[0].get_provider_options())

    def io_binding(self) -> SegmentedBinding:
        """Where values are bound to names of the graph."""
        return SegmentedBinding(self)

    def run_with_iobinding(self, binding: SegmentedBinding) -> None:
        """Run all parts on what is bound."""
        binding.run()


class SegmentedBinding:
    """As much of an ``onnxruntime.IOBinding`` as is used here.

    Args:
        session: whose parts are bound.
    """

    def __init__(self, session: SegmentedSession) -> None:
        self._session = session
        pairs = zip(session.sessions, session.parts, strict=True)
        crossing = {name for part in session.parts for name in part.reads}
        self._own = [_Bound(own, part, crossing) for own, part in pairs]
        self._asked: list[str] = []

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        """Let every part that reads an input read this value."""
        for own in self._own:
            if name in own.inputs:
                own.io.bind_ortvalue_input(name, value)

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        """Let an output be written there."""
        own = self._maker(name)
        own.io.bind_ortvalue_output(name, value)
        own.note(name)

    def bind_output(self, name: str) -> None:
        """Let an output be computed, for :meth:`copy_outputs_to_cpu`."""
        own = self._maker(name)
        own.io.bind_output(name)
        own.note(name)
        if name not in self._asked:
            self._asked.append(name)

    def copy_outputs_to_cpu(self) -> list[NDArray[Any]]:
        """What :meth:`bind_output` asked for, in that order."""
        return [self._maker(name).value(name).numpy() for name in self._asked]

    def run(self) -> None:
        """Run all parts."""
        passed: dict[str, Any] = {}
        for index, own in enumerate(self._own):
            passed |= own.run(passed)
            if index >= self._session.kept:
                self._session.files[index].give_all_back()

    def _maker(self, name: str) -> _Bound:
        return next(own for own in self._own if name in own.part.ends)


class _Bound:
    """The binding of one part; ``crossing``: what any part reads of another."""

    def __init__(self, session: Any, part: Part, crossing: Set[str]) -> None:
        self.part = part
        self.io = session.io_binding()
        self.inputs = {x.name for x in session.get_inputs()} - set(part.reads)
        self._session = session
        self._crossing = [name for name in part.gives if name in crossing]
        self._names: list[str] = []  # in the order in which they were bound first

    def note(self, name: str) -> None:
        if name not in self._names:
            self._names.append(name)

    def value(self, name: str) -> Any:
        return self.io.get_outputs()[self._names.index(name)]

    def run(self, passed: Mapping[str, Any]) -> dict[str, Any]:
        """Run the part; returns what it gives to later ones."""
        for name in self.part.reads:
            self.io.bind_ortvalue_input(name, passed[name])
        for name in self._crossing:
            self.io.bind_output(name)  # anew: its shape may be another one
            self.note(name)
        self._session.run_with_iobinding(self.io)
        found = self.io.get_outputs()
        return dict(zip(self._names, found, strict=True))
