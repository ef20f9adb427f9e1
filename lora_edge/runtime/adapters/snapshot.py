"""The adapters as they are between two overrides -> what is bound for rows in their states.

Knows how factors combine; knows nothing of how a state is asked for, of sessions or tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from lora_edge.bundle.bundle import Bundle
from lora_edge.bundle.onnx_adapter import parse_adapter
from lora_edge.errors import BundleError, DataError
from lora_edge.maths.lora import Head, SiteChange, concatenate
from lora_edge.names import NONE_ADAPTER, SELECT
from lora_edge.runtime.adapters.binding import Binding, Changes, State, Tensors, TokenGates, Values
from lora_edge.runtime.adapters.by_row import stacked
from lora_edge.runtime.adapters.changes import parse_changes
from lora_edge.runtime.resident import ADAPTER, COMBINED, Key, SizedCache

_BINDINGS = 16  # weights of one adapter, or orders of rows, whose bindings are kept


@dataclass(frozen=True)
class _Resident:
    """Adapters in memory: one, a blend, or those of a mixed batch side by side.

    Attributes:
        changes: what one adapter changes; empty for several.
        values: the factors and stacked vectors that are bound.
        ranks: module path -> rank of each of several adapters there.
        bindings: by weight, or by the states of the rows.
    """

    changes: Changes
    values: Values
    ranks: Mapping[str, Sequence[int]] = field(default_factory=dict)
    bindings: SizedCache = field(default_factory=lambda: SizedCache(_BINDINGS))


@dataclass(frozen=True)
class Snapshot:
    """The adapters of one bundle at one moment: what one binding is made of.

    It never changes, so that a binding is of one moment, whatever other threads override meanwhile.

    Attributes:
        bundle: the bundle; files are verified against its manifest as they are read.
        tensors: makes the OrtValues in the provider's memory.
        cache: where they are kept.
        nothing: what is bound where no adapter runs.
        overrides: what adapters change whose own files are not used.
        generation: number of overrides so far: what was made under another is not found any more.
    """

    bundle: Bundle
    tensors: Tensors
    cache: SizedCache
    nothing: Binding
    overrides: Mapping[str, Changes] = field(default_factory=dict)
    generation: int = 0

    def overridden(self, name: str, changes: Changes | None) -> Snapshot:
        """The next one, with other changes of an adapter; None: with its own again."""
        others = {key: value for key, value in self.overrides.items() if key != name}
        own = {} if changes is None else {name: changes}
        return replace(self, overrides=others | own, generation=self.generation + 1)

    def key(self, name: str) -> Key:
        """What an adapter is found by in the cache."""
        return ADAPTER, self.generation, name

    def changes(self, name: str) -> Changes:
        """What an adapter changes at the sites that it touches.

        Raises:
            BundleError: its file is damaged, or it was made for another base.
        """
        return self._resident(name).changes

    def binding_of(self, states: tuple[State, ...]) -> Binding:
        """What to bind for a batch.

        Args:
            states: the canonical state of every row.

        Raises:
            DataError: no adapter where the base has no task head.
            BundleError: an adapter's file is damaged, or it was made for another base.
        """
        if self.bundle.manifest.mode == "merged":
            return self.nothing
        if len(set(states)) == 1:
            return self._alike(states[0])
        if self.tensors.one_row:
            return Binding(states, {}, each=tuple(self._alike(state) for state in states))
        return self._rows(states)

    def by_row(self, states: tuple[State, ...]) -> Binding:
        """What to bind for unlike rows to a graph whose A and B have an axis of rows.

        Raises:
            BundleError: an adapter's file is damaged, or it was made for another base.
        """
        return self.cache.get_or_make(
            (COMBINED, self.generation, states, "by row"), lambda: self._under(states)
        )

    def _under(self, states: tuple[State, ...]) -> tuple[Binding, int]:
        """Adapters of rows one under the other, and their bytes."""
        changes = {
            state: self.changes(state[0][0]) if _plain(state) else self._blend(state)
            for state in set(states)
        }
        found = stacked(self.tensors.sites, [changes[state] for state in states])
        arrays = {name: self.tensors.cast(array) for name, array in found.items()}
        own = {
            name: array
            for name, array in arrays.items()
            if name == SELECT or (name.endswith((".A", ".B")) and len(array) == len(states))
        }
        values = {name: self.tensors.value(array) for name, array in arrays.items()}
        return Binding(states, values, own), sum(array.nbytes for array in arrays.values())

    def _alike(self, state: State) -> Binding:
        heads, labels = self._heads((state,))
        if not state and not heads[0]:
            return self.nothing
        if not state:
            return Binding(((),), {**self.nothing.values, **heads[0]}, labels=labels)
        if len(state) == 1:
            name, weight = state[0]
            resident = self._resident(name)
        else:
            name, weight = "", 1.0
            resident = self.cache.get_or_make(
                (COMBINED, self.generation, state), lambda: self._blended(state)
            )
        if heads[0]:
            return self._one(resident, state, name, weight, heads[0], labels)
        return resident.bindings.get_or_make(
            (weight,), lambda: (self._one(resident, state, name, weight, {}, ()), 1)
        )

    def _one(
        self,
        resident: _Resident,
        state: State,
        name: str,
        weight: float,
        heads: Values,
        labels: tuple[int, ...],
    ) -> Binding:
        """All rows in one state: an adapter at a weight, or a blend, which has no name."""
        gates = None
        invocation = self.bundle.adapter(name).invocation if name else ()
        if invocation:
            layouts: dict[tuple[int, ...], tuple[str, ...]] = {(1,): self.tensors.gates}
            weights = np.full((1, 1), weight, np.float32)
            gates = TokenGates(weights, (invocation,), layouts, self.tensors)
        everything = {**resident.values, **self.tensors.weight(weight), **heads}
        return Binding((state,), everything, token_gates=gates, labels=labels)

    def _rows(self, states: tuple[State, ...]) -> Binding:
        names = tuple(sorted({name for state in states for name, _ in state}))
        resident = self.cache.get_or_make(
            (COMBINED, self.generation, names), lambda: self._together(names)
        )
        if self.tensors.heads:
            return self._mixed(resident, states, names)
        return resident.bindings.get_or_make(
            states, lambda: (self._mixed(resident, states, names), 1)
        )

    def _mixed(
        self, resident: _Resident, states: tuple[State, ...], names: tuple[str, ...]
    ) -> Binding:
        """Rows in unlike states."""
        weights = np.zeros((len(states), len(names)), np.float32)
        for row, state in enumerate(states):
            for name, weight in state:
                weights[row, names.index(name)] = weight
        by_row, arrays = self.tensors.row_weights(resident.ranks, weights)
        heads, labels = self._heads(states)
        invocations = tuple(self.bundle.adapter(name).invocation for name in names)
        gates = None
        if any(invocations):
            layouts = self.tensors.layouts(resident.ranks)
            gates = TokenGates(weights, invocations, layouts, self.tensors)
        values = {**resident.values, **by_row, **heads[0]}
        return Binding(states, values, {**arrays, **heads[1]}, gates, labels)

    def _heads(
        self, states: tuple[State, ...]
    ) -> tuple[tuple[Values, Mapping[str, NDArray[np.floating]]], tuple[int, ...]]:
        """The task heads of the rows, their arrays, and each row's number of labels."""
        values: Values = {}
        arrays: dict[str, NDArray[np.floating]] = {}
        labels: tuple[int, ...] = ()
        for path in self.tensors.heads:
            heads = [self._head(state, path) for state in states]
            made, own = self.tensors.head(heads, path)
            values, arrays = values | made, arrays | own
            labels = tuple(head.labels for head in heads)
        return (values, arrays), labels

    def _head(self, state: State, path: str) -> Head:
        base = self.changes(NONE_ADAPTER).get(path, SiteChange()).head
        own = [self.changes(name).get(path, SiteChange()).head for name, _ in state]
        head = next((head for head in own if head is not None), base)
        if head is None:
            raise DataError(
                f"the base has no task head {path}, and no adapter that brings one was chosen",
                f"Choose an adapter: {', '.join(sorted(self.bundle.manifest.adapters))}",
            )
        return head

    def _blend(self, parts: Sequence[tuple[str, float]]) -> dict[str, SiteChange]:
        """The weighted sum of adapters: pairs side by side, vectors added."""
        together = {}
        loaded = [(self.changes(name), weight) for name, weight in parts]
        for path in self.tensors.sites:
            touching = [(x[path], weight) for x, weight in loaded if path in x]
            pairs = [(x.factors, w) for x, w in touching if x.factors is not None]
            together[path] = SiteChange(
                factors=concatenate(pairs) if pairs else None,
                bias=_weighted([(x.bias, w) for x, w in touching]),
                weight=_weighted([(x.weight, w) for x, w in touching]),
            )
        return together

    def _blended(self, state: State) -> tuple[_Resident, int]:
        """A blend, and its bytes."""
        blend = self._blend(state)
        self.tensors.check_fits(blend, f"the blend of {' and '.join(name for name, _ in state)}")
        values = self.tensors.changes(blend, [blend])
        return _Resident({}, values), _bytes(blend) + self.tensors.copied(values)

    def _together(self, names: tuple[str, ...]) -> tuple[_Resident, int]:
        """Adapters side by side, for rows in unlike states, and their bytes."""
        together = self._blend([(name, 1.0) for name in names])
        each = [self.changes(name) for name in names]
        values = self.tensors.changes(together, each)
        ranks = {
            path: [change.get(path, SiteChange()).rank for change in each]
            for path in self.tensors.sites
        }
        return _Resident({}, values, ranks), _bytes(together) + self.tensors.copied(values)

    def _resident(self, name: str) -> _Resident:
        """One adapter."""
        found: _Resident = self.cache.get_or_make(self.key(name), lambda: self._loaded(name))
        return found

    def _loaded(self, name: str) -> tuple[_Resident, int]:
        changes = self.overrides.get(name)
        if changes is None:
            changes = self._read(name)
        self.tensors.check_fits(changes, f"adapter {name!r}")
        values = self.tensors.changes(changes, [changes])
        return _Resident(changes, values), _bytes(changes) + self.tensors.copied(values)

    def _read(self, name: str) -> Changes:
        entry = self.bundle.adapter(name)
        base = self.bundle.manifest.base["fingerprint"]
        if entry.base_fingerprint != base:
            raise BundleError(
                f"adapter {name!r} was exported for the base {entry.base_fingerprint}, "
                f"the bundle's base is {base}",
                f"Add it again: lora-edge add {self.bundle.directory} -a {name}=PEFT_DIRECTORY",
            )
        source = str(self.bundle.path(entry.file))
        tensors = parse_adapter(self.bundle.read(entry.file), source)
        return parse_changes(source, tensors, self.tensors.sites)


def _plain(state: State) -> bool:
    """One adapter as it is."""
    return len(state) == 1 and state[0][1] == 1.0


def _weighted(
    parts: Sequence[tuple[NDArray[np.float32] | None, float]],
) -> NDArray[np.float32] | None:
    terms = [np.float32(weight) * vector for vector, weight in parts if vector is not None]
    return sum(terms[1:], terms[0]) if terms else None


def _bytes(changes: Changes) -> int:
    """Bytes of all arrays."""
    total = 0
    for change in changes.values():
        arrays = [*change.stacked().values()]
        if change.factors is not None:
            arrays += [change.factors.A, change.factors.B]
        if change.head is not None:
            arrays += [change.head.W, change.head.c]
        total += sum(array.nbytes for array in arrays if array is not None)
    return total
