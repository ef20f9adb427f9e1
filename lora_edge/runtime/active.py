"""Adapter states -> what is bound: off, one adapter, a blend, or one of these for every row.

Knows the bundle's adapters and how their factors combine; knows nothing of sessions or tokens.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from lora_edge.bundle import Bundle
from lora_edge.errors import AdapterNotFoundError, BundleError, DataError
from lora_edge.lora import Factors, concatenate
from lora_edge.names import NONE_ADAPTER, PARTS, lora_input
from lora_edge.runtime.adapter_file import read_adapter
from lora_edge.runtime.binding import Binding, State, Tensors, Values

Choice = str | Mapping[str, float] | None
"""What one row may ask for: off (None), an adapter's name, or a blend ``{name: weight}``."""

AdapterArgument = Choice | Sequence[Choice]
"""One choice for all rows, or a list with one per row."""

_CACHED = 8
T = TypeVar("T")


class ActiveAdapters:
    """The adapters of one bundle, loaded when first used, combined on request.

    One adapter is bound as it was loaded: switching is a change of pointers. Blends and mixed
    batches are concatenated along the rank, and the last few of each are kept.

    Args:
        bundle: the bundle; files are verified against its manifest before they are read.
        tensors: makes the OrtValues in the provider's memory.
    """

    def __init__(self, bundle: Bundle, tensors: Tensors) -> None:
        self._bundle = bundle
        self._tensors = tensors
        self._factors: dict[str, Mapping[str, Factors]] = {}
        self._bound: dict[str, Values] = {}
        self._blends: OrderedDict[Hashable, Values] = OrderedDict()
        self._mixed: OrderedDict[Hashable, Values] = OrderedDict()
        self._off = tensors.off()

    def binding(self, adapter: AdapterArgument, batch: int) -> Binding:
        """What to bind for a batch.

        Args:
            adapter: a choice for all rows, or one per row.
            batch: number of rows.

        Raises:
            AdapterNotFoundError: a name that the bundle does not have.
            DataError: a list of another length than the batch, or a weight that is not finite.
            BundleError: an adapter's file is damaged, or it was made for another base.
        """
        states = self.states(adapter, batch)
        if self._bundle.manifest.mode == "merged":
            return self._off
        if len(set(states)) == 1:
            return self._alike(states[0])
        return self._rows(states)

    def states(self, adapter: AdapterArgument, batch: int) -> tuple[State, ...]:
        """The canonical state of every row; raises as :meth:`binding`, except for damaged files."""
        if adapter is None or isinstance(adapter, str | Mapping):
            return (self._state(adapter),) * batch
        if not isinstance(adapter, Sequence):
            raise DataError(
                f"adapter is {type(adapter).__name__}, expected a name, None, a blend or a list",
                "A blend is written {'name': weight, ...}.",
            )
        if len(adapter) != batch:
            raise DataError(
                f"{len(adapter)} adapters were given for {batch} rows",
                "Give one adapter for all rows, or a list with one per row.",
            )
        return tuple(self._state(choice) for choice in adapter)

    def factors(self, name: str) -> Mapping[str, Factors]:
        """An adapter's factors at the sites that it touches; raises as :meth:`binding`."""
        if name not in self._factors:
            self._factors[name] = self._load(name)
        return self._factors[name]

    def override(self, name: str, tensors: Mapping[str, NDArray[np.floating]] | None) -> None:
        """Use other tensors for an adapter from now on, in this process only.

        Args:
            name: an adapter of the bundle.
            tensors: graph input name -> array, as in its adapter file (the gates may be left out);
                None brings the bundle's own back.

        Raises:
            AdapterNotFoundError: the bundle has no such adapter.
            BundleError: the tensors do not fit the graph's sites.
            DataError: the bundle is merged, or the name is ``none``.
        """
        self._bundle.adapter(name)
        if self._bundle.manifest.mode == "merged" or name == NONE_ADAPTER:
            raise DataError(
                f"the tensors of {name!r} cannot be replaced",
                "Only the adapters of a switchable bundle can.",
            )
        loaded = None if tensors is None else self._parse(f"override of {name!r}", tensors)
        self._factors.pop(name, None)
        self._bound.pop(name, None)
        self._blends.clear()
        self._mixed.clear()
        if loaded is not None:
            self._factors[name] = loaded

    def _state(self, choice: Choice) -> State:
        merged = self._bundle.manifest.mode == "merged"
        if choice is None:
            return ()
        if isinstance(choice, str):
            choice = {choice: 1.0}
        if not isinstance(choice, Mapping):
            raise DataError(
                f"adapter is {choice!r}, expected a name, None or a blend {{name: weight}}",
                "A batch takes a list with one of these per row.",
            )
        weights: dict[str, float] = {}
        for name, weight in choice.items():
            if merged or name != NONE_ADAPTER:
                self._bundle.adapter(name)
            if isinstance(weight, bool) or not isinstance(weight, int | float | np.number):
                raise DataError(
                    f"the weight of {name!r} is {weight!r}, expected a number",
                    "A blend is written {'name': weight, ...}.",
                )
            if not math.isfinite(weight):
                raise DataError(
                    f"the weight of {name!r} is {weight}, expected a finite number",
                    "Weights are plain factors; 1 is the adapter as it was trained.",
                )
            weights[name] = float(weight)
        if merged:
            return self._merged_state(weights)
        return tuple(sorted((n, w) for n, w in weights.items() if n != NONE_ADAPTER and w != 0.0))

    def _merged_state(self, weights: Mapping[str, float]) -> State:
        if list(weights.values()) != [1.0]:
            raise AdapterNotFoundError(
                f"a merged bundle runs its one adapter at weight 1; asked for {dict(weights)}",
                "Export with mode='switchable' to weight, blend or switch adapters.",
            )
        return ()

    def _alike(self, state: State) -> Binding:
        if not state:
            return self._off
        if len(state) == 1:
            name, weight = state[0]
            if name not in self._bound:
                self._bound[name] = self._tensors.factors(self.factors(name))
            return Binding((state,), {**self._bound[name], **self._tensors.gate(weight)})
        values = _recall(self._blends, state)
        if values is None:
            blend = self._concatenate(state)
            values = _keep(self._blends, state, self._tensors.factors(blend))
        return Binding((state,), {**values, **self._tensors.gate(1.0)})

    def _rows(self, states: tuple[State, ...]) -> Binding:
        names = tuple(sorted({name for state in states for name, _ in state}))
        values = _recall(self._mixed, names)
        if values is None:
            together = self._concatenate([(name, 1.0) for name in names])
            values = _keep(self._mixed, names, self._tensors.factors(together))
        weights = np.zeros((len(states), len(names)), np.float32)
        for row, state in enumerate(states):
            for name, weight in state:
                weights[row, names.index(name)] = weight
        ranks = {path: [self._rank(name, path) for name in names] for path in self._tensors.sites}
        gates, arrays = self._tensors.row_gates(ranks, weights)
        return Binding(states, {**values, **gates}, arrays)

    def _rank(self, name: str, path: str) -> int:
        factors = self.factors(name).get(path)
        return 0 if factors is None else factors.rank

    def _concatenate(self, parts: Sequence[tuple[str, float]]) -> dict[str, Factors]:
        together = {}
        for path in self._tensors.sites:
            touching = [(self.factors(n)[path], w) for n, w in parts if path in self.factors(n)]
            if touching:
                together[path] = concatenate(touching)
        return together

    def _load(self, name: str) -> Mapping[str, Factors]:
        entry = self._bundle.adapter(name)
        base = self._bundle.manifest.base["fingerprint"]
        if entry.base_fingerprint != base:
            raise BundleError(
                f"adapter {name!r} was exported for the base {entry.base_fingerprint}, "
                f"the bundle's base is {base}",
                f"Add it again: lora-edge add {self._bundle.directory} -a {name}=PEFT_DIRECTORY",
            )
        path = self._bundle.verify(entry.file)
        return self._parse(str(path), read_adapter(path))

    def _parse(
        self, source: str, tensors: Mapping[str, NDArray[np.floating]]
    ) -> dict[str, Factors]:
        """Tensors by input name -> factors by module path, sites of rank 0 left out."""
        hint = "The file is not of this bundle; add the adapter again."
        sites = self._tensors.sites
        unknown = set(tensors) - {lora_input(path, part) for path in sites for part in PARTS}
        if unknown:
            raise BundleError(f"{source}: {min(unknown)} is not an input of the graph", hint)
        factors = {}
        for path, site in sites.items():
            names = lora_input(path, "A"), lora_input(path, "B")
            missing = [name for name in names if name not in tensors]
            if missing:
                raise BundleError(f"{source}: {missing[0]} is missing", hint)
            a, b = (np.ascontiguousarray(tensors[name], np.float32) for name in names)
            rank = a.shape[-1] if a.ndim else 0
            expected = (site.in_features, rank), (rank, site.out_features)
            if (a.shape, b.shape) != expected:
                raise BundleError(
                    f"{source}: {path} has A {list(a.shape)} and B {list(b.shape)}, expected "
                    f"[{site.in_features}, R] and [R, {site.out_features}]",
                    hint,
                )
            gate = tensors.get(lora_input(path, "gate"))
            if gate is not None and (gate.shape != (1, 1, 1) or gate.item() != 1.0):
                raise BundleError(f"{source}: the gate of {path} is not [1, 1, 1] of 1", hint)
            if rank:
                factors[path] = Factors(a, b)
        return factors


def _recall(cache: OrderedDict[Hashable, T], key: Hashable) -> T | None:
    if key in cache:
        cache.move_to_end(key)
    return cache.get(key)


def _keep(cache: OrderedDict[Hashable, T], key: Hashable, value: T) -> T:
    cache[key] = value
    if len(cache) > _CACHED:
        cache.popitem(last=False)
    return value
