"""What all sessions on a model's graphs have in common: provider, adapter inputs, the batch.

Knows tensors; knows nothing of bundles, adapters' names or text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from numpy.typing import NDArray

from lora_edge.bundle.manifest import SiteEntry, Spec
from lora_edge.errors import BundleError, DataError
from lora_edge.runtime.adapters.binding import Binding, State, Tensors, check_adapter_inputs
from lora_edge.runtime.providers import open_session, placement, resolve
from lora_edge.runtime.sizes import Sizes, check_sizes, site_sizes


@dataclass(frozen=True)
class OpenGraph:
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


@dataclass(frozen=True)
class Fixed:
    """An adapter state that is in a session's weights, instead of being bound.

    Attributes:
        state: the state.
        weights: initializer name -> OrtValue, of those in external data whose values change.
    """

    state: State
    weights: Mapping[str, Any]


class ModelSession(ABC, Generic[Spec]):
    """A model's graphs on one execution provider. Graphs without adapter inputs run alike.

    Args:
        path: the ONNX file, or the folder that holds several.
        spec: the graph's facts.
        sites: module path -> site, when the graph has adapter inputs.
        provider: execution provider, strict (see :mod:`lora_edge.runtime.providers`).
        threads: intra-op threads; None leaves it to ONNX Runtime.
        optimization: ``disable``, ``basic``, ``extended`` or ``all`` (None).
        allow_fallback: let the CPU run the nodes that the provider does not take.
        provider_options: the provider's own, name -> value.
        fixed: the state of every batch, on graphs without adapter inputs.

    Raises:
        ProviderError: the provider is missing, does not start, or would leave work on floats to
            the CPU.
        BundleError: a graph cannot be loaded, or its inputs and their sizes are not what ``spec``
            and ``sites`` say.
    """

    def __init__(
        self,
        path: Path,
        spec: Spec,
        *,
        sites: Mapping[str, SiteEntry] | None = None,
        provider: str = "cpu",
        threads: int | None = None,
        optimization: str | None = None,
        allow_fallback: bool = False,
        provider_options: Mapping[str, str] | None = None,
        fixed: Fixed | None = None,
    ) -> None:
        self.spec: Spec = spec
        self.sites = dict(sites or {})
        self.provider = resolve(provider, provider_options)
        # Kept for as long as the sessions: those do not keep the weights alive.
        self._options: dict[str, Any] = {
            "threads": threads,
            "optimization": optimization,
            "allow_fallback": allow_fallback,
            "weights": {} if fixed is None else fixed.weights,
        }
        self._graphs: list[OpenGraph] = []
        self._open(path)
        self.tensors = Tensors(self.sites, self.provider.device, zero_rank=self.provider.zero_rank)
        self._fixed = fixed
        self._off = self.tensors.off() if fixed is None else Binding((fixed.state,), {})

    @abstractmethod
    def _open(self, path: Path) -> None:
        """Open the model's graphs by :meth:`_graph`."""

    def _sizes(self) -> Sizes:
        """What ``spec`` says of the sizes of inputs and outputs."""
        return {}

    def _graph(
        self,
        path: Path,
        inputs: Set[str],
        outputs: Set[str],
        sites: Mapping[str, SiteEntry] | None = None,
    ) -> OpenGraph:
        """Open a graph and check that it has these inputs and outputs, and those of the sites.

        Args:
            path: the ONNX file.
            inputs: names that it must have; it may have more.
            outputs: the same of its outputs.
            sites: the sites whose adapter inputs are in this graph; None is all.
        """
        session: Any = open_session(path, self.provider, **self._options)
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
        missing = sorted(inputs - set(graph.inputs)) + sorted(outputs - set(graph.outputs))
        if missing:
            raise BundleError(f"{path} lacks {', '.join(missing)}", "Export the bundle again.")
        own = self.sites if sites is None else sites
        check_adapter_inputs(graph.inputs, own, path)
        shapes = {name: shape for name, _, shape in (*given, *made)}
        check_sizes(shapes, {**site_sizes(own), **self._sizes()}, path)
        self._graphs.append(graph)
        return graph

    def placement(self) -> dict[str, dict[str, int]] | None:
        """Which provider runs which operators (:func:`lora_edge.runtime.providers.placement`).

        Of several graphs, their nodes together.
        """
        together: dict[str, dict[str, int]] = {}
        for graph in self._graphs:
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
        if self._fixed is not None and binding.states != self._off.states:
            raise DataError(
                f"this session's weights hold {self._fixed.state}, and {binding.states} was asked "
                "for",
                "Start other adapters on the Runner's decoder.",
            )
        if binding.batch is not None and binding.batch != batch:
            raise DataError(
                f"adapters were given for {binding.batch} rows, the batch has {batch}",
                "Give one adapter, or one per row.",
            )
        return binding
