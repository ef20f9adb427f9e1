"""What all sessions on a model's graphs have in common: provider, adapter inputs, the batch.

Knows tensors; knows nothing of bundles, adapters' names or text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_edge.bundle.part import Cache, Part
from lora_edge.errors import BundleError, DataError
from lora_edge.names import SELECT, parse_lora_input, past_name, present_name
from lora_edge.runtime.adapters.binding import Binding, State, Tensors, check_adapter_inputs
from lora_edge.runtime.providers import open_session, placement, resolve
from lora_edge.runtime.resident import CACHE_BYTES, SizedCache
from lora_edge.runtime.sizes import Sizes, check_sizes, site_sizes

if TYPE_CHECKING:
    from lora_edge.runtime.native.library import Native
    from lora_edge.runtime.prepared import PreparedGraphs
    from lora_edge.runtime.segmented import Cut


HALF_TENSOR = "tensor(float16)"


class OpenGraph(NamedTuple):
    """A graph in an ONNX Runtime session.

    Attributes:
        session: the ``onnxruntime.InferenceSession``.
        inputs: name of each input -> its type as ONNX Runtime writes it, ``tensor(float)``.
        outputs: name of each output, in the graph's order.
    """

    session: Any
    inputs: Mapping[str, str]
    outputs: tuple[str, ...]

    def run(self, values: Mapping[str, Any], binding: Binding, output: str) -> NDArray[Any]:
        """One output, copied out of ONNX Runtime: what a binding allocates dies with it there.

        Args:
            values: input name -> OrtValue.
            binding: the adapters; of its tensors those are bound that the graph has inputs for.
            output: the output's name.
        """
        io = self.session.io_binding()  # which does not keep its values alive
        for name, value in (*values.items(), *binding.values.items()):
            if name in self.inputs:
                io.bind_ortvalue_input(name, value)
        io.bind_output(output)
        self.session.run_with_iobinding(io)
        found: NDArray[Any] = io.copy_outputs_to_cpu()[0]
        return found


class Fixed(NamedTuple):
    """An adapter state that is in a session's weights, instead of being bound.

    Attributes:
        state: the state.
        weights: initializer name -> OrtValue, of those in external data whose values change.
    """

    state: State
    weights: Mapping[str, Any]


class ModelSession:
    """A model's parts on one execution provider. Graphs without adapter inputs run alike.

    Args:
        folder: what the parts' files are relative to.
        parts: name -> part.
        provider: execution provider, strict (see :mod:`lora_edge.runtime.providers`).
        threads: intra-op threads; None leaves it to ONNX Runtime.
        optimization: ``disable``, ``basic``, ``extended`` or ``all`` (None).
        allow_fallback: let the CPU run the nodes that the provider does not take.
        provider_options: the provider's own, name -> value.
        fixed: the state of every batch, on graphs without adapter inputs.
        prepared: keeps the optimized graphs; None: each session optimizes its own.
        resident: where what is used again is kept; None: a cache of its own.
        by_row: A and B of the graphs have an axis of rows.
        native: open the graphs' native form, where they are prepared.
        cut: cuts each graph into parts whose weights are in memory in turns, on the CPU.

    Raises:
        ProviderError: the provider is missing, does not start, or would leave work on floats to
            the CPU.
        BundleError: a graph cannot be loaded, or its inputs and their sizes are not what its part
            says.
    """

    def __init__(
        self,
        folder: Path,
        parts: Mapping[str, Part],
        *,
        provider: str = "cpu",
        threads: int | None = None,
        optimization: str | None = None,
        allow_fallback: bool = False,
        provider_options: Mapping[str, str] | None = None,
        fixed: Fixed | None = None,
        prepared: PreparedGraphs | None = None,
        resident: SizedCache | None = None,
        by_row: bool = False,
        native: Native | None = None,
        cut: Cut | None = None,
    ) -> None:
        self.resident = SizedCache(CACHE_BYTES) if resident is None else resident
        self.parts = parts
        self.sites = {path: site for part in parts.values() for path, site in part.sites.items()}
        self.provider = resolve(provider, provider_options)
        self.by_row = by_row
        self._cut = cut
        # Kept for as long as the sessions: those do not keep the weights alive.
        self._options: dict[str, Any] = {
            "threads": threads,
            "optimization": optimization,
            "allow_fallback": allow_fallback,
            "weights": {} if fixed is None else fixed.weights,
            "prepared": prepared,
            "native": native,
        }
        self.graphs = {name: self._open(folder / part.file, part) for name, part in parts.items()}
        target = self.provider.target
        kinds = {x for each in self.graphs.values() for x in each.inputs.items()}
        half = any(kind == HALF_TENSOR and _is_adapters(name) for name, kind in kinds)
        static = next((part.static for part in parts.values() if part.is_static), None)
        if static is None:
            self.tensors = Tensors(
                self.sites,
                target.memory,
                zero_rank=target.zero_size is True,
                dtype=np.float16 if half else np.float32,
            )
        else:
            from lora_edge.runtime.adapters.padded import PaddedTensors  # few sessions need it

            self.tensors = PaddedTensors(self.sites, target.memory, static)
        self.fixed = fixed
        self._off = self.tensors.off() if fixed is None else Binding((fixed.state,), {})

    def _open(self, path: Path, part: Part) -> OpenGraph:
        """Open a graph, and check that it has the inputs and outputs that its part says."""
        session: Any
        if self._cut is None:
            session = open_session(path, self.provider, **self._options)
        else:
            from lora_edge.runtime.segmented import SegmentedSession  # which few need

            level, threads = self._options["optimization"], self._options["threads"]
            session = SegmentedSession(path, self._cut(path), level or "all", threads)
        try:
            given: list[tuple[str, str, Any]] = [
                (x.name, x.type, x.shape) for x in session.get_inputs()
            ]
            made: list[tuple[str, str, Any]] = [
                (x.name, x.type, x.shape) for x in session.get_outputs()
            ]
        except UnicodeDecodeError as error:
            raise BundleError(
                f"{path} has a name that is not UTF-8", "Copy the bundle again."
            ) from error
        graph = OpenGraph(
            session, {name: kind for name, kind, _ in given}, tuple(name for name, _, _ in made)
        )
        inputs, outputs = set(part.inputs), {str(part.output)}
        if part.cache is not None:
            inputs |= set(past_names(part.cache))
            outputs |= set(present_names(part.cache))
        missing = sorted(inputs - set(graph.inputs)) + sorted(outputs - set(graph.outputs))
        if missing:
            raise BundleError(f"{path} lacks {', '.join(missing)}", "Export the bundle again.")
        check_adapter_inputs(graph.inputs, part.sites, path)
        shapes = {name: shape for name, _, shape in (*given, *made)}
        static = part.static if part.is_static else None
        sites = site_sizes(part.sites, by_row=self.by_row, static=static)
        check_sizes(shapes, {**sites, **_sizes(part)}, path)
        return graph

    @property
    def session(self) -> Any:
        """The ``onnxruntime.InferenceSession`` of the first graph; another may take its place."""
        return next(iter(self.graphs.values())).session

    @session.setter
    def session(self, session: Any) -> None:
        name = next(iter(self.graphs))
        self.graphs[name] = self.graphs[name]._replace(session=session)

    def let_go(self) -> None:
        """Give back what can be of the weights' memory, until the next run: of graphs in parts."""
        for graph in self.graphs.values():
            if hasattr(graph.session, "let_go"):
                graph.session.let_go()

    @property
    def segments(self) -> int:
        """In how many parts the graphs run; 1: none is cut."""
        return max(len(getattr(x.session, "sessions", (0,))) for x in self.graphs.values())

    def placement(self) -> dict[str, dict[str, int]] | None:
        """Which provider runs which operators (:func:`lora_edge.runtime.providers.placement`).

        Of several graphs, their nodes together.
        """
        together: dict[str, dict[str, int]] = {}
        for graph in self.graphs.values():
            placed = placement(graph.session)
            if placed is None:
                return None
            for provider, operators in placed.items():
                counts = together.setdefault(provider, {})
                for operator, count in operators.items():
                    counts[operator] = counts.get(operator, 0) + count
        return together

    def _bound(self, binding: Binding | None, batch: int) -> Binding:
        """The adapters of a batch; off where none are given, or what is in the weights.

        Raises:
            DataError: they are for another batch, or other than those in the weights.
        """
        if binding is None:
            return self._off
        if self.fixed is not None and binding.states != self._off.states:
            raise DataError(
                f"this session's weights hold {self.fixed.state}, and {binding.states} was asked "
                "for",
                "Start other adapters on the Runner's decoder.",
            )
        if binding.batch is not None and binding.batch != batch:
            raise DataError(
                f"adapters were given for {binding.batch} rows, the batch has {batch}",
                "Give one adapter, or one per row.",
            )
        return binding


def _is_adapters(name: str) -> bool:
    return name == SELECT or parse_lora_input(name) is not None


def past_names(cache: Cache) -> Sequence[str]:
    """The inputs of a cache, keys and values of each layer."""
    return [past_name(layer, kind) for layer in range(cache.layers) for kind in ("key", "value")]


def present_names(cache: Cache) -> Sequence[str]:
    """The outputs of a cache, in the order of :func:`past_names`."""
    return [present_name(layer, kind) for layer in range(cache.layers) for kind in ("key", "value")]


def _sizes(part: Part) -> Sizes:
    """What a part says of the sizes of inputs and outputs."""
    found: dict[str, Sequence[int | None]] = {}
    if part.sample:
        found[part.inputs[0]] = (None, *part.sample)
    if part.cache is not None:
        shape = (None, part.cache.kv_heads, None, part.cache.head_dim)
        found |= dict.fromkeys((*past_names(part.cache), *present_names(part.cache)), shape)
        found[part.output] = (None, None, part.vocab_size)
    if part.cache is not None and part.static is not None and part.is_static:
        heads, dim, static = part.cache.kv_heads, part.cache.head_dim, part.static
        found |= dict.fromkeys(past_names(part.cache), (1, heads, static.past, dim))
        found |= dict.fromkeys(present_names(part.cache), (1, heads, static.seq, dim))
        found[part.output] = (1, static.seq, part.vocab_size)
        found |= dict.fromkeys(("input_ids", "position_ids"), (1, static.seq))
        found["attention_mask"] = (1, static.room)
    return found
