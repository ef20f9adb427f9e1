"""Adapter states -> what is bound: off, one adapter, a blend, or one of these for every row.

Knows the bundle's adapters and how their factors combine; knows nothing of sessions or tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from lora_edge.bundle.bundle import Bundle
from lora_edge.bundle.onnx_adapter import read_adapter
from lora_edge.errors import AdapterNotFoundError, BundleError, DataError
from lora_edge.maths.lora import Head, SiteChange, concatenate
from lora_edge.names import NONE_ADAPTER
from lora_edge.runtime.adapters.binding import Binding, Changes, State, Tensors, TokenGates, Values
from lora_edge.runtime.adapters.changes import parse_changes

Choice = str | Mapping[str, float] | None
"""What one row may ask for: off (None), an adapter's name, or a blend ``{name: weight}``."""

AdapterArgument = Choice | Sequence[Choice]
"""One choice for all rows, or a list with one per row."""

_CACHED = 8
_LARGEST = float(np.finfo(np.float32).max)
T = TypeVar("T")


class ActiveAdapters:
    """The adapters of one bundle, loaded when first used, combined on request.

    One adapter is bound as it was loaded: switching is a change of pointers. Blends and mixed
    batches are concatenated along the rank and stacked, and the last few of each are kept.

    Args:
        bundle: the bundle; files are verified against its manifest before they are read.
        tensors: makes the OrtValues in the provider's memory.
    """

    def __init__(self, bundle: Bundle, tensors: Tensors) -> None:
        self._bundle = bundle
        self._tensors = tensors
        self._changes: dict[str, Changes] = {}
        self._bound: dict[str, Values] = {}
        self._blends: OrderedDict[Hashable, Values] = OrderedDict()
        self._mixed: OrderedDict[Hashable, Values] = OrderedDict()
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
        states = self.states(adapter, batch)
        if self._bundle.manifest.mode == "merged":
            return self._nothing
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

    def changes(self, name: str) -> Changes:
        """What an adapter changes at the sites that it touches; raises as :meth:`binding`."""
        if name not in self._changes:
            self._changes[name] = self._load(name)
        return self._changes[name]

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
        self._changes.pop(name, None)
        self._bound.pop(name, None)
        self._blends.clear()
        self._mixed.clear()
        if loaded is not None:
            self._changes[name] = loaded

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
        if not state:
            return Binding(((),), {**self._nothing.values, **heads[0]}, labels=labels)
        if len(state) == 1:
            name, weight = state[0]
            if name not in self._bound:
                changes = self.changes(name)
                self._bound[name] = self._tensors.changes(changes, [changes])
            values, gates = self._bound[name], None
            invocation = self._bundle.adapter(name).invocation
            if invocation:
                layouts: dict[tuple[int, ...], tuple[str, ...]] = {(1,): self._tensors.gates}
                weights = np.full((1, 1), weight, np.float32)
                gates = TokenGates(weights, (invocation,), layouts, self._tensors)
            everything = {**values, **self._tensors.weight(weight), **heads[0]}
            return Binding((state,), everything, token_gates=gates, labels=labels)
        blended = _recall(self._blends, state)
        if blended is None:
            blend = self._blend(state)
            blended = _keep(self._blends, state, self._tensors.changes(blend, [blend]))
        return Binding(
            (state,), {**blended, **self._tensors.weight(1.0), **heads[0]}, labels=labels
        )

    def _rows(self, states: tuple[State, ...]) -> Binding:
        names = tuple(sorted({name for state in states for name, _ in state}))
        values = _recall(self._mixed, names)
        if values is None:
            together = self._blend([(name, 1.0) for name in names])
            each = [self.changes(name) for name in names]
            values = _keep(self._mixed, names, self._tensors.changes(together, each))
        weights = np.zeros((len(states), len(names)), np.float32)
        for row, state in enumerate(states):
            for name, weight in state:
                weights[row, names.index(name)] = weight
        ranks = {path: [self._rank(name, path) for name in names] for path in self._tensors.sites}
        by_row, arrays = self._tensors.row_weights(ranks, weights)
        heads, labels = self._heads(states)
        invocations = tuple(self._bundle.adapter(name).invocation for name in names)
        gates = None
        if any(invocations):
            layouts = self._tensors.layouts(ranks)
            gates = TokenGates(weights, invocations, layouts, self._tensors)
        return Binding(
            states, {**values, **by_row, **heads[0]}, {**arrays, **heads[1]}, gates, labels
        )

    def _heads(
        self, states: tuple[State, ...]
    ) -> tuple[tuple[Values, Mapping[str, NDArray[np.float32]]], tuple[int, ...]]:
        """The task heads of the rows, their arrays, and each row's number of labels."""
        values: Values = {}
        arrays: dict[str, NDArray[np.float32]] = {}
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

    def _rank(self, name: str, path: str) -> int:
        return self.changes(name).get(path, SiteChange()).rank

    def _blend(self, parts: Sequence[tuple[str, float]]) -> dict[str, SiteChange]:
        """The weighted sum of adapters: pairs side by side, vectors added."""
        together = {}
        for path in self._tensors.sites:
            touching = [(self.changes(n)[path], w) for n, w in parts if path in self.changes(n)]
            pairs = [(x.factors, w) for x, w in touching if x.factors is not None]
            together[path] = SiteChange(
                factors=concatenate(pairs) if pairs else None,
                bias=_weighted([(x.bias, w) for x, w in touching]),
                weight=_weighted([(x.weight, w) for x, w in touching]),
            )
        return together

    def _load(self, name: str) -> Changes:
        entry = self._bundle.adapter(name)
        base = self._bundle.manifest.base["fingerprint"]
        if entry.base_fingerprint != base:
            raise BundleError(
                f"adapter {name!r} was exported for the base {entry.base_fingerprint}, "
                f"the bundle's base is {base}",
                f"Add it again: lora-edge add {self._bundle.directory} -a {name}=PEFT_DIRECTORY",
            )
        path = self._bundle.verify(entry.file)
        return parse_changes(str(path), read_adapter(path), self._tensors.sites)


def _weighted(
    parts: Sequence[tuple[NDArray[np.float32] | None, float]],
) -> NDArray[np.float32] | None:
    terms = [np.float32(weight) * vector for vector, weight in parts if vector is not None]
    return sum(terms[1:], terms[0]) if terms else None


def _recall(cache: OrderedDict[Hashable, T], key: Hashable) -> T | None:
    if key in cache:
        cache.move_to_end(key)
    return cache.get(key)


def _keep(cache: OrderedDict[Hashable, T], key: Hashable, value: T) -> T:
    cache[key] = value
    if len(cache) > _CACHED:
        cache.popitem(last=False)
    return value
