"""What is bound to a graph's adapter inputs: tensors, and the states that they stand for.

Knows names and tensors; knows nothing of bundles or sessions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from lora_edge.bundle import SiteEntry
from lora_edge.errors import BundleError
from lora_edge.lora import Factors, FloatArray, row_gate, zeros
from lora_edge.names import PARTS, lora_input, parse_lora_input

State = tuple[tuple[str, float], ...]
"""One row's adapter state, canonical: (name, weight) sorted by name; empty when off."""

Values = dict[str, Any]
"""Graph input name -> OrtValue."""


@dataclass(frozen=True)
class Binding:
    """The adapter inputs of one batch.

    Attributes:
        states: one state for every row alike, or one per row.
        values: graph input name -> OrtValue, for every adapter input of the graph.
        gates: graph input name -> ``[batch, 1, R] float32``, the gates that differ by row; empty
            when all rows are alike.
    """

    states: tuple[State, ...]
    values: Mapping[str, Any]
    gates: Mapping[str, FloatArray] = field(default_factory=dict)

    @property
    def batch(self) -> int | None:
        """Number of rows that it is for; None when it serves any number."""
        return len(self.states) if len(self.states) > 1 else None

    def row(self, index: int) -> Binding:
        """The binding of one row alone, sharing the factors."""
        if self.batch is None:
            return self
        values = dict(self.values)
        shared: dict[int, Any] = {}
        for name, gate in self.gates.items():
            if id(gate) not in shared:
                shared[id(gate)] = ort.OrtValue.ortvalue_from_numpy(gate[index : index + 1])
            values[name] = shared[id(gate)]
        return Binding((self.states[index],), values)


def check_adapter_inputs(
    inputs: Collection[str], sites: Mapping[str, SiteEntry], graph: Path
) -> None:
    """Check that a graph's adapter inputs are those of the sites, and no others.

    Raises:
        BundleError: names the first that differs.
    """
    expected = {lora_input(path, part) for path in sites for part in PARTS}
    odd = sorted({name for name in inputs if parse_lora_input(name) is not None} ^ expected)
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
    """

    def __init__(
        self, sites: Mapping[str, SiteEntry], device: str = "cpu", *, zero_rank: bool = True
    ) -> None:
        self.sites = sites
        self._device = device
        self._rank = 0 if zero_rank else 1
        self._zeros: dict[SiteEntry, tuple[Any, Any]] = {}
        self._gates: dict[float, Any] = {}

    def value(self, array: FloatArray) -> Any:
        """The OrtValue of an array; on the CPU it is a view of the array, which it keeps alive."""
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device)

    def factors(self, factors: Mapping[str, Factors]) -> Values:
        """A and B of every site; where absent or of rank 0, shared tensors of zeros."""
        values: Values = {}
        for path, site in self.sites.items():
            pair = factors.get(path)
            if pair is None or pair.rank == 0:
                a, b = self._nothing(site)
            else:
                a, b = self.value(pair.A), self.value(pair.B)
            values[lora_input(path, "A")], values[lora_input(path, "B")] = a, b
        return values

    def gate(self, weight: float) -> Values:
        """The same weight for every row, token and rank: one ``[1, 1, 1]`` tensor for all."""
        if weight not in self._gates:
            self._gates[weight] = self.value(np.full((1, 1, 1), weight, np.float32))
        return {lora_input(path, "gate"): self._gates[weight] for path in self.sites}

    def row_gates(
        self, ranks: Mapping[str, Sequence[int]], weights: FloatArray
    ) -> tuple[Values, dict[str, FloatArray]]:
        """Row-wise gates; sites with the same ranks share one tensor.

        Args:
            ranks: module path -> rank of each concatenated adapter at that site.
            weights: ``[batch, adapters] float32``.

        Returns:
            The OrtValues, and the arrays of those that differ by row.
        """
        values, arrays = self.gate(1.0), {}
        layouts: dict[tuple[int, ...], tuple[Any, FloatArray]] = {}
        for path in self.sites:
            layout = tuple(ranks[path])
            if not sum(layout):
                continue
            if layout not in layouts:
                array = row_gate(layout, weights)
                layouts[layout] = self.value(array), array
            name = lora_input(path, "gate")
            values[name], arrays[name] = layouts[layout]
        return values, arrays

    def off(self) -> Binding:
        """No adapter on any row."""
        return Binding(((),), {**self.factors({}), **self.gate(1.0)})

    def _nothing(self, site: SiteEntry) -> tuple[Any, Any]:
        if site not in self._zeros:
            pair = zeros(site.in_features, site.out_features, self._rank)
            self._zeros[site] = self.value(pair.A), self.value(pair.B)
        return self._zeros[site]
