"""Adapter states -> what is bound: off, one adapter, a blend, or one of these for every row.

Knows the bundle's adapters and how their factors combine; knows nothing of sessions or tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lora_edge.bundle.bundle import Bundle
from lora_edge.bundle.onnx_adapter import parse_adapter
from lora_edge.errors import AdapterNotFoundError, BundleError, DataError
from lora_edge.maths.lora import Head, SiteChange, concatenate
from lora_edge.names import NONE_ADAPTER, SELECT
from lora_edge.runtime.adapters.binding import Binding, Changes, State, Tensors, TokenGates, Values
from lora_edge.runtime.adapters.by_row import stacked
from lora_edge.runtime.adapters.changes import parse_changes
from lora_edge.runtime.resident import ADAPTER, CACHE_BYTES, COMBINED, Key, SizedCache

Choice = str | Mapping[str, float] | None
"""What one row may ask for: off (None), an adapter's name, or a blend ``{name: weight}``."""

AdapterArgument = Choice | Sequence[Choice]
"""One choice for all rows, or a list with one per row."""

_BINDINGS = 16  # weights of one adapter, or orders of rows, whose bindings are kept
_LARGEST = float(np.finfo(np.float32).max)


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


class ActiveAdapters:
    """The adapters of one bundle, loaded when first used, combined on request.

    One adapter is bound as it was loaded: switching is a change of pointers. Blends and mixed
    batches are concatenated along the rank and stacked. The last used ones stay in memory, and with
    them what was bound.

    Args:
        bundle: the bundle; files are verified against its manifest as they are read.
        tensors: makes the OrtValues in the provider's memory.
        cache: where they are kept.
        keep: adapters that are never dropped from it once they are loaded.
    """

    def __init__(
        self,
        bundle: Bundle,
        tensors: Tensors,
        cache: SizedCache | None = None,
        keep: Collection[str] = (),
    ) -> None:
        self._bundle = bundle
        self._tensors = tensors
        self._cache = SizedCache(CACHE_BYTES) if cache is None else cache
        self._overrides: dict[str, Changes] = {}
        self._generation = 0  # of the overrides: what was made under another is not found any more
        self._keep = frozenset(keep)
        self._pin()
        self._nothing = tensors.off()

    def binding(self, adapter: AdapterArgument, batch: int) -> Binding:
        """What to bind for a batch.

        Args:
            adapter: a choice for all rows, or one per row.
            batch: number of rows.

        Raises:
            AdapterNotFoundError: a name that the bundle does not have.
            DataError: a list of another length than the batch, a weight that is not finite, a
                blend of an adapter that cannot be blended, or no adapter where the base has no
                task head.
            BundleError: an adapter's file is damaged, or it was made for another base.
        """
        return self.binding_of(self.states(adapter, batch))

    def binding_of(self, states: tuple[State, ...]) -> Binding:
        """As :meth:`binding`, of the canonical state of every row."""
        if self._bundle.manifest.mode == "merged":
            return self._nothing
        if len(set(states)) == 1:
            return self._alike(states[0])
        return self._rows(states)

    def by_row(self, states: tuple[State, ...]) -> Binding:
        """What to bind for unlike rows to a graph whose A and B have an axis of rows.

        Raises:
            BundleError: an adapter's file is damaged, or it was made for another base.
        """
        return self._cache.get_or_make(
            (COMBINED, self._generation, states, "by row"), lambda: self._under(states)
        )

    def _under(self, states: tuple[State, ...]) -> tuple[Binding, int]:
        """Adapters of rows one under the other, and their bytes."""
        changes = {
            state: self.changes(state[0][0]) if _plain(state) else self._blend(state)
            for state in set(states)
        }
        found = stacked(self._tensors.sites, [changes[state] for state in states])
        arrays = {name: self._tensors.cast(array) for name, array in found.items()}
        own = {
            name: array
            for name, array in arrays.items()
            if name == SELECT or (name.endswith((".A", ".B")) and len(array) == len(states))
        }
        values = {name: self._tensors.value(array) for name, array in arrays.items()}
        return Binding(states, values, own), sum(array.nbytes for array in arrays.values())

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

    def load(self, name: str) -> None:
        """Load an adapter, of a switchable bundle; raises as :meth:`binding`."""
        self._bundle.adapter(name)
        if self._bundle.manifest.mode == "switchable":
            self._resident(name)

    def changes(self, name: str) -> Changes:
        """What an adapter changes at the sites that it touches; raises as :meth:`binding`."""
        return self._resident(name).changes

    @property
    def generation(self) -> int:
        """A number that changes when an adapter's tensors do."""
        return self._generation

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
        loaded = None
        if tensors is not None:
            loaded = parse_changes(f"override of {name!r}", tensors, self._tensors.sites)
        if loaded is None:
            self._overrides.pop(name, None)
        else:
            self._overrides[name] = loaded
        self._generation += 1
        self._pin()
        now = self._generation
        self._cache.clear(lambda key: key[0] in (ADAPTER, COMBINED) and key[1] != now)

    def _pin(self) -> None:
        self._cache.pin([self._key(name) for name in self._keep])

    def _key(self, name: str) -> Key:
        return ADAPTER, self._generation, name

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
            if isinstance(weight, bool) or not isinstance(
                weight, int | float | np.integer | np.floating
            ):
                raise DataError(
                    f"the weight of {name!r} is {weight!r}, expected a number",
                    "A blend is written {'name': weight, ...}.",
                )
            if not abs(weight) <= _LARGEST:
                raise DataError(
                    f"the weight of {name!r} is {weight}, expected a number that is finite in "
                    "float32",
                    "Weights are plain factors; 1 is the adapter as it was trained.",
                )
            weights[name] = float(weight)
        if merged:
            return self._merged_state(weights)
        state = tuple(sorted((n, w) for n, w in weights.items() if n != NONE_ADAPTER and w != 0.0))
        for name, weight in state:
            reason = self._bundle.adapter(name).alone
            if reason and (len(state) > 1 or weight != 1.0):
                raise DataError(
                    f"adapter {name!r} cannot be blended or weighted: {reason}",
                    "Use it alone on its row, at weight 1.",
                )
        return state

    def _merged_state(self, weights: Mapping[str, float]) -> State:
        if list(weights.values()) != [1.0]:
            raise AdapterNotFoundError(
                f"a merged bundle runs its one adapter at weight 1; asked for {dict(weights)}",
                "Export with mode='switchable' to weight, blend or switch adapters.",
            )
        return ()

    def _alike(self, state: State) -> Binding:
        heads, labels = self._heads((state,))
        if not state and not heads[0]:
            return self._nothing
        if not state:
            return Binding(((),), {**self._nothing.values, **heads[0]}, labels=labels)
        if len(state) == 1:
            name, weight = state[0]
            resident = self._resident(name)
        else:
            name, weight = "", 1.0
            resident = self._cache.get_or_make(
                (COMBINED, self._generation, state), lambda: self._blended(state)
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
        invocation = self._bundle.adapter(name).invocation if name else ()
        if invocation:
            layouts: dict[tuple[int, ...], tuple[str, ...]] = {(1,): self._tensors.gates}
            weights = np.full((1, 1), weight, np.float32)
            gates = TokenGates(weights, (invocation,), layouts, self._tensors)
        everything = {**resident.values, **self._tensors.weight(weight), **heads}
        return Binding((state,), everything, token_gates=gates, labels=labels)

    def _rows(self, states: tuple[State, ...]) -> Binding:
        names = tuple(sorted({name for state in states for name, _ in state}))
        resident = self._cache.get_or_make(
            (COMBINED, self._generation, names), lambda: self._together(names)
        )
        if self._tensors.heads:
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
        by_row, arrays = self._tensors.row_weights(resident.ranks, weights)
        heads, labels = self._heads(states)
        invocations = tuple(self._bundle.adapter(name).invocation for name in names)
        gates = None
        if any(invocations):
            layouts = self._tensors.layouts(resident.ranks)
            gates = TokenGates(weights, invocations, layouts, self._tensors)
        values = {**resident.values, **by_row, **heads[0]}
        return Binding(states, values, {**arrays, **heads[1]}, gates, labels)

    def _heads(
        self, states: tuple[State, ...]
    ) -> tuple[tuple[Values, Mapping[str, NDArray[np.floating]]], tuple[int, ...]]:
        """The task heads of the rows, their arrays, and each row's number of labels."""
        values: Values = {}
        arrays: dict[str, NDArray[np.floating]] = {}
        labels: tuple[int, ...] = ()
        for path in self._tensors.heads:
            heads = [self._head(state, path) for state in states]
            made, own = self._tensors.head(heads, path)
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
                f"Choose an adapter: {', '.join(sorted(self._bundle.manifest.adapters))}",
            )
        return head

    def _blend(self, parts: Sequence[tuple[str, float]]) -> dict[str, SiteChange]:
        """The weighted sum of adapters: pairs side by side, vectors added."""
        together = {}
        loaded = [(self.changes(name), weight) for name, weight in parts]
        for path in self._tensors.sites:
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
        values = self._tensors.changes(blend, [blend])
        return _Resident({}, values), _bytes(blend) + self._tensors.copied(values)

    def _together(self, names: tuple[str, ...]) -> tuple[_Resident, int]:
        """Adapters side by side, for rows in unlike states, and their bytes."""
        together = self._blend([(name, 1.0) for name in names])
        each = [self.changes(name) for name in names]
        values = self._tensors.changes(together, each)
        ranks = {
            path: [change.get(path, SiteChange()).rank for change in each]
            for path in self._tensors.sites
        }
        return _Resident({}, values, ranks), _bytes(together) + self._tensors.copied(values)

    def _resident(self, name: str) -> _Resident:
        """One adapter."""
        found: _Resident = self._cache.get_or_make(self._key(name), lambda: self._loaded(name))
        return found

    def _loaded(self, name: str) -> tuple[_Resident, int]:
        changes = self._overrides.get(name)
        if changes is None:
            changes = self._read(name)
        values = self._tensors.changes(changes, [changes])
        return _Resident(changes, values), _bytes(changes) + self._tensors.copied(values)

    def _read(self, name: str) -> Changes:
        entry = self._bundle.adapter(name)
        base = self._bundle.manifest.base["fingerprint"]
        if entry.base_fingerprint != base:
            raise BundleError(
                f"adapter {name!r} was exported for the base {entry.base_fingerprint}, "
                f"the bundle's base is {base}",
                f"Add it again: lora-edge add {self._bundle.directory} -a {name}=PEFT_DIRECTORY",
            )
        source = str(self._bundle.path(entry.file))
        tensors = parse_adapter(self._bundle.read(entry.file), source)
        return parse_changes(source, tensors, self._tensors.sites)


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
