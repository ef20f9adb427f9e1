"""Adapter states -> what is bound: off, one adapter, a blend, or one of these for every row.

Knows the bundle's adapters and which tensors are theirs now; knows nothing of sessions or tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from lora_edge.bundle.bundle import Bundle
from lora_edge.errors import AdapterNotFoundError, DataError
from lora_edge.names import NONE_ADAPTER
from lora_edge.runtime.adapters.binding import Binding, Changes, State, Tensors
from lora_edge.runtime.adapters.changes import parse_changes
from lora_edge.runtime.adapters.snapshot import Snapshot
from lora_edge.runtime.resident import ADAPTER, CACHE_BYTES, COMBINED, SizedCache

Choice = str | Mapping[str, float] | None
"""What one row may ask for: off (None), an adapter's name, or a blend ``{name: weight}``."""

AdapterArgument = Choice | Sequence[Choice]
"""One choice for all rows, or a list with one per row."""

_LARGEST = float(np.finfo(np.float32).max)


class ActiveAdapters:
    """The adapters of one bundle, loaded when first used, combined on request.

    One adapter is bound as it was loaded: switching is a change of pointers. Blends and mixed
    batches are concatenated along the rank and stacked. The last used ones stay in memory, and with
    them what was bound. Safe to use from several threads.

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
        self._keep = frozenset(keep)
        self._overriding = Lock()
        # Whoever binds reads this once: an override puts another in its place.
        self._now = Snapshot(bundle, tensors, self._cache, tensors.off())
        self._pin(self._now)

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
        return self._now.binding_of(states)

    def by_row(self, states: tuple[State, ...]) -> Binding:
        """What to bind for unlike rows to a graph whose A and B have an axis of rows.

        Raises:
            BundleError: an adapter's file is damaged, or it was made for another base.
        """
        return self._now.by_row(states)

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
            self.changes(name)

    def changes(self, name: str) -> Changes:
        """What an adapter changes at the sites that it touches; raises as :meth:`binding`."""
        return self._now.changes(name)

    @property
    def generation(self) -> int:
        """A number that changes when an adapter's tensors do."""
        return self._now.generation

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
        with self._overriding:
            now = self._now.overridden(name, loaded)
            self._pin(now)
            self._now = now
            self._cache.clear(
                lambda key: key[0] in (ADAPTER, COMBINED) and key[1] != now.generation
            )

    def _pin(self, snapshot: Snapshot) -> None:
        self._cache.pin([snapshot.key(name) for name in self._keep])

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
