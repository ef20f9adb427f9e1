"""What is bound to a graph's adapter inputs: tensors, and the states that they stand for.

Knows names and tensors; knows nothing of bundles or sessions.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike, NDArray

from lora_edge.bundle.part import SiteEntry
from lora_edge.errors import BundleError, DataError
from lora_edge.maths.half import overflow
from lora_edge.maths.lora import FloatArray, Head, SiteChange, row_gate, zeros
from lora_edge.names import SELECT, STACKED_PARTS, lora_input, parse_lora_input

State = tuple[tuple[str, float], ...]
"""One row's adapter state, canonical: (name, weight) sorted by name; empty when off."""

Values = dict[str, Any]
"""Graph input name -> OrtValue."""

Changes = Mapping[str, SiteChange]
"""Module path -> what one adapter changes there."""

_KEPT_WEIGHTS = 64
_SPARE = 8  # as many decodings as are likely to run at once under the same adapters
NEVER = np.iinfo(np.int64).max
"""The first position of an adapter that is not active on a row."""


class TokenGates(NamedTuple):
    """Gates that open at a token: at least one of the adapters is an aLoRA.

    Attributes:
        weights: ``[batch | 1, n] float32``, the weight of each of n adapters on each row.
        invocations: of each adapter the token ids that activate it; empty: active everywhere.
        layouts: rank of each adapter at a site -> names of the gates of the sites that have them.
        tensors: makes the OrtValues.
    """

    weights: FloatArray
    invocations: tuple[tuple[int, ...], ...]
    layouts: Mapping[tuple[int, ...], tuple[str, ...]]
    tensors: Tensors

    def starts(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """``[batch, n]``: the position from which each adapter is active on each row.

        That is where the last occurrence of its invocation begins, decided once by the prompt.
        """
        return np.array(
            [[invoked_at(row, invocation) for invocation in self.invocations] for row in prompts],
            np.int64,
        )

    def row(self, index: int) -> TokenGates:
        """The gates of one row alone."""
        weights = self.weights if len(self.weights) == 1 else self.weights[index : index + 1]
        return TokenGates(weights, self.invocations, self.layouts, self.tensors)

    def active(self, starts: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """``[batch, width, n]``: which adapters are active on which tokens of a chunk.

        Args:
            starts: of :meth:`starts`.
            positions: ``[batch, width]``, the position of each token.
        """
        found: NDArray[np.bool_] = positions[:, :, None] >= starts[:, None, :]
        return found

    def values(self, active: NDArray[np.bool_], only: str | None = None) -> Values:
        """The gates of a chunk.

        Args:
            active: of :meth:`active`.
            only: the one gate that is wanted.
        """
        weights = self.weights[:, None, :] * active.astype(np.float32)
        values: Values = {}
        for layout, names in self.layouts.items():
            wanted = names if only is None else [name for name in names if name == only]
            if wanted:
                value = self.tensors.value(row_gate(layout, weights))
                values.update(dict.fromkeys(wanted, value))
        return values


def invoked_at(row: Sequence[int], invocation: Sequence[int]) -> int:
    """The position from which an adapter is active on a row that begins with a prompt."""
    if not invocation:
        return 0
    wanted = list(invocation)
    for start in range(len(row) - len(wanted), -1, -1):
        if list(row[start : start + len(wanted)]) == wanted:
            return start
    return int(NEVER)


@dataclass(frozen=True, eq=False)
class Binding:
    """The adapter inputs of one batch.

    Whoever asks for the same adapters again should get the same Binding again: what they were bound
    to is kept with it.

    Attributes:
        states: one state for every row alike, or one per row.
        values: graph input name -> OrtValue, for every adapter input of the graph.
        rows: graph input name -> ``[batch, …]``, in the graph's dtype, the tensors that differ by
            row (gates, ``lora.select``, task heads); empty when all rows are alike.
        token_gates: the gates, where they depend on the tokens too.
        labels: number of outputs of each row's task head; empty where no row has its own.
        each: the binding of each row, for a graph that runs one row; empty for any other.
        spare: IO bindings that it is bound to already and that nobody uses
            (:class:`~lora_edge.runtime.feeds.Feeds`); a deque, whose appends and pops are atomic.
    """

    states: tuple[State, ...]
    values: Mapping[str, Any]
    rows: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)
    token_gates: TokenGates | None = None
    labels: tuple[int, ...] = ()
    each: tuple[Binding, ...] = ()
    spare: deque[Any] = field(default_factory=lambda: deque(maxlen=_SPARE), repr=False)

    @property
    def batch(self) -> int | None:
        """Number of rows that it is for; None when it serves any number."""
        return len(self.states) if len(self.states) > 1 else None

    def row(self, index: int) -> Binding:
        """The binding of one row alone, sharing the factors."""
        if self.batch is None:
            return self
        if self.each:
            return self.each[index]
        values = dict(self.values)
        shared: dict[int, Any] = {}
        for name, array in self.rows.items():
            if id(array) not in shared:
                shared[id(array)] = ort.OrtValue.ortvalue_from_numpy(array[index : index + 1])
            values[name] = shared[id(array)]
        gates = None if self.token_gates is None else self.token_gates.row(index)
        return Binding((self.states[index],), values, token_gates=gates)


def check_adapter_inputs(
    inputs: Collection[str], sites: Mapping[str, SiteEntry], graph: Path
) -> None:
    """Check that a graph's adapter inputs are those of the sites, and no others.

    Raises:
        BundleError: names the first that differs.
    """
    expected = {lora_input(path, part) for path, site in sites.items() for part in site.parts}
    if any(set(STACKED_PARTS) & set(site.parts) for site in sites.values()):
        expected.add(SELECT)
    found = {name for name in inputs if name == SELECT or parse_lora_input(name) is not None}
    odd = sorted(found ^ expected)
    if odd:
        raise BundleError(
            f"{graph}: adapter inputs differ from the sites; the first is {odd[0]}",
            "Export the bundle again.",
        )


class Tensors:
    """Makes the OrtValues of a graph's sites in one provider's memory.

    Args:
        sites: module path -> site.
        device: memory of the tensors (``cpu``, ``cuda``).
        zero_rank: the provider takes zero-size dimensions; else "nothing" is rank 1 of zeros.
        dtype: of the graph's adapter inputs, to which everything is converted.
    """

    one_row: ClassVar[bool] = False  # the graph runs one

    def __init__(
        self,
        sites: Mapping[str, SiteEntry],
        device: str = "cpu",
        *,
        zero_rank: bool = True,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.sites = sites
        self.gates = tuple(
            lora_input(path, "gate") for path, site in sites.items() if "gate" in site.parts
        )
        self.heads = tuple(path for path, site in sites.items() if "W" in site.parts)
        self._selects = any(set(STACKED_PARTS) & set(site.parts) for site in sites.values())
        self._device = device
        self._dtype = np.dtype(dtype)
        self._rank = 0 if zero_rank else 1
        self._zeros: dict[tuple[int, int, int], tuple[Any, Any]] = {}
        self._empty: dict[tuple[int, int], Any] = {}
        self._gates: OrderedDict[float, Any] = OrderedDict()

    def check_fits(self, changes: Changes, who: str) -> None:
        """Refuse what a graph with fixed shapes has no room for; any other graph takes all."""

    def value(self, array: FloatArray) -> Any:
        """The OrtValue of an array; on the CPU it is a view of the array, which it keeps alive."""
        own = np.ascontiguousarray(self.cast(array))
        return ort.OrtValue.ortvalue_from_numpy(own, self._device)

    def cast(self, array: FloatArray) -> NDArray[np.floating]:
        """An array in the dtype of the graph's inputs; itself where it has it.

        Raises:
            DataError: float16 cannot hold a number of it.
        """
        if array.dtype == self._dtype:
            return array
        if self._dtype == np.float16 and (largest := overflow(array)):
            raise DataError(
                f"an adapter's tensor holds {largest:.6g}, and this bundle's graph computes in "
                "float16, which has no number above 65504",
                "Weight the adapter less, or export with --precision fp32.",
            )
        return array.astype(self._dtype)

    @property
    def _views(self) -> bool:
        """Pairs are bound where they lie."""
        return self._device == "cpu" and self._dtype == np.float32

    def changes(self, together: Changes, stacked: Sequence[Changes]) -> Values:
        """A, B and the stacked tensors of every site; where absent, shared tensors of zeros.

        Args:
            together: whose low-rank pairs are bound, all resident adapters' in one.
            stacked: each resident adapter, whose vectors are stacked in this order.
        """
        values: Values = {}
        for path, site in self.sites.items():
            if "A" in site.parts:
                change = together.get(path)
                if change is None or change.factors is None or change.rank == 0:
                    a, b = self._nothing(site)
                else:
                    a, b = self.value(change.factors.A), self.value(change.factors.B)
                values[lora_input(path, "A")], values[lora_input(path, "B")] = a, b
            own = [change.get(path, SiteChange()).stacked() for change in stacked]
            for part in STACKED_PARTS:
                if part in site.parts:
                    vectors = [vectors[part] for vectors in own]
                    values[lora_input(path, part)] = self._stack(vectors, site.out_features)
        return values

    def copied(self, values: Values) -> int:
        """Bytes of the tensors of :meth:`changes` that are copies of an adapter's own arrays.

        On the CPU pairs are views, and vectors are copied into stacks.
        """
        own = {
            id(value): self._dtype.itemsize * math.prod(value.shape())
            for name, value in values.items()
            if not self._views or not name.endswith((".A", ".B"))
        }
        return sum(own.values())

    def weight(self, weight: float) -> Values:
        """The same weight for every row, token and rank: one ``[1, 1, 1]`` tensor for all."""
        gate = self._gates.get(weight)
        if gate is None:
            gate = self._gates[weight] = self.value(np.full((1, 1, 1), weight, np.float32))
            if len(self._gates) > _KEPT_WEIGHTS:
                self._gates.popitem(last=False)
        values = dict.fromkeys(self.gates, gate)
        if self._selects:
            values[SELECT] = gate
        return values

    def row_weights(
        self, ranks: Mapping[str, Sequence[int]], weights: FloatArray
    ) -> tuple[Values, dict[str, NDArray[np.floating]]]:
        """Row-wise gates and ``lora.select``; sites with the same ranks share one tensor.

        Args:
            ranks: module path -> rank of each concatenated adapter at that site.
            weights: ``[batch, adapters] float32``.

        Returns:
            The OrtValues, and the arrays of those that differ by row.
        """
        values = self.weight(1.0)
        arrays: dict[str, NDArray[np.floating]] = {}
        for layout, names in self.layouts(ranks).items():
            array = self.cast(row_gate(layout, weights[:, None, :]))
            values.update(dict.fromkeys(names, self.value(array)))
            arrays.update(dict.fromkeys(names, array))
        if self._selects:
            array = self.cast(np.ascontiguousarray(weights[:, None, :]))
            values[SELECT], arrays[SELECT] = self.value(array), array
        return values, arrays

    def layouts(self, ranks: Mapping[str, Sequence[int]]) -> dict[tuple[int, ...], tuple[str, ...]]:
        """Ranks of the adapters at a site -> the gates of the sites that have them."""
        found: dict[tuple[int, ...], tuple[str, ...]] = {}
        for path, site in self.sites.items():
            layout = tuple(ranks[path])
            if "gate" in site.parts and any(layout):
                found[layout] = (*found.get(layout, ()), lora_input(path, "gate"))
        return found

    def head(
        self, heads: Sequence[Head], path: str
    ) -> tuple[Values, dict[str, NDArray[np.floating]]]:
        """A task head for every row, or one for all; fewer labels are padded with zeros."""
        labels = max(head.labels for head in heads)
        w = np.zeros((len(heads), heads[0].W.shape[0], labels), np.float32)
        c = np.zeros((len(heads), 1, labels), np.float32)
        for index, head in enumerate(heads):
            w[index, :, : head.labels] = head.W
            c[index, 0, : head.labels] = head.c
        arrays = {lora_input(path, "W"): self.cast(w), lora_input(path, "c"): self.cast(c)}
        values = {name: self.value(array) for name, array in arrays.items()}
        return values, arrays if len(heads) > 1 else {}

    def off(self) -> Binding:
        """No adapter on any row; without task heads, which only a bundle has."""
        return Binding(((),), {**self.changes({}, [{}]), **self.weight(1.0)})

    def _nothing(self, site: SiteEntry) -> tuple[Any, Any]:
        rank = max(self._rank, 1) if site.kind == "conv" else self._rank
        key = site.in_features, site.out_features, rank
        if key not in self._zeros:
            pair = zeros(*key)
            self._zeros[key] = self.value(pair.A), self.value(pair.B)
        return self._zeros[key]

    def _stack(self, vectors: Sequence[FloatArray | None], size: int) -> Any:
        if any(vector is not None for vector in vectors):
            empty = np.zeros(size, np.float32)
            return self.value(np.stack([empty if x is None else x for x in vectors]))
        key = len(vectors), size
        if key not in self._empty:
            self._empty[key] = self.value(np.zeros(key, np.float32))
        return self._empty[key]
