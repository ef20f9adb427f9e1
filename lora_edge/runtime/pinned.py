"""Sessions whose weights are one adapter's: which adapters can be pinned, and their merged weights.

A batch whose rows all use a pinned adapter runs on the graph without branches. Everything else is
the switchable graph's affair, which is what was proved: a pinned session is compared with it before
it is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lora_edge.bundle.bundle import BASE_GRAPH_FILE, DATA_FILE, Bundle
from lora_edge.bundle.part import SiteEntry, WeightEntry
from lora_edge.errors import BundleError, DataError
from lora_edge.maths.lora import Factors, SiteChange, delta
from lora_edge.runtime.adapters.active import ActiveAdapters
from lora_edge.runtime.adapters.binding import Binding, Changes, State, Values
from lora_edge.runtime.decoder import Decoder
from lora_edge.runtime.routes import check_agrees
from lora_edge.runtime.session import Fixed

_UNPIN = "Leave it out of pinned: it runs on the switchable graph."
_BLOCK = 1 << 20  # numbers in float64 at once: a large head is never whole in it
_AGAIN = "Export the bundle again with this release."


class PinnedSessions:
    """Decoders of the graph without branches, one for each pinned adapter, opened when first used.

    Args:
        bundle: the bundle; the graph is checked against its hash before it is opened.
        switchable: gives the session on the graph with branches.
        active: its adapters.
        names: adapters to pin; None (or ``none``) is no adapter.
        options: of every session: provider, threads, ...

    Raises:
        AdapterNotFoundError: a name that the bundle does not have.
        DataError: an adapter cannot be pinned.
        BundleError: the bundle has no graph to pin on, or an adapter's file is damaged.
    """

    def __init__(
        self,
        bundle: Bundle,
        switchable: Callable[[], Decoder],
        active: ActiveAdapters,
        names: Sequence[str | None],
        options: Mapping[str, Any],
    ) -> None:
        if (
            isinstance(names, str)
            or not isinstance(names, Collection)
            or not all(isinstance(x, str | None) for x in names)
        ):
            raise DataError(
                f"pinned is {names!r}, expected a list of adapters' names or None",
                "A pinned session holds one adapter at weight 1, or none: pinned=['name', None].",
            )
        self._bundle = bundle
        self._switchable = switchable
        self._active = active
        self._options = dict(options)
        self._opened: dict[State, tuple[Decoder, Binding]] = {}
        if names:
            _check_bundle(bundle)
        self._states = frozenset(active.states(tuple(names), len(names)))
        for name in sorted(self.names):
            _check(name, active.changes(name), bundle)

    @property
    def names(self) -> frozenset[str]:
        """The adapters that are pinned, without ``none``."""
        return frozenset(name for state in self._states for name, _ in state)

    def find(self, states: Sequence[State]) -> tuple[Decoder, Binding] | None:
        """The session for a batch, and its binding: the key of the cache, and no tensors.

        Args:
            states: the canonical state of every row.

        Returns:
            None where the batch is for the switchable graph.

        Raises:
            BundleError: the graph or its data is missing, damaged or cut off, or gives something
                else than the switchable graph.
        """
        state = states[0] if len(set(states)) == 1 else None
        if state is None or state not in self._states:
            return None
        if state not in self._opened:
            decoder = self._open(state)
            binding = Binding((state,), {})
            check_agrees(decoder, binding, self._switchable(), self._active, (state,), "pinned")
            self._opened[state] = decoder, binding
        return self._opened[state]

    def _open(self, state: State) -> Decoder:
        self._bundle.verify(BASE_GRAPH_FILE)
        sites = self._bundle.manifest.sites
        data = self._bundle.directory / DATA_FILE
        values: Values = {}
        for name, _ in state:  # one, or none
            values = merged_values(data, sites, self._active.changes(name))
        fixed = Fixed(state, values)
        part = self._bundle.manifest.parts["decoder"]
        plain = dataclasses.replace(part, file=BASE_GRAPH_FILE, sites={})
        return Decoder(self._bundle.directory, {"decoder": plain}, fixed=fixed, **self._options)


def merged_values(data: Path, sites: Mapping[str, SiteEntry], changes: Changes) -> Values:
    """The base's weights with an adapter in them, of those that it changes.

    Each is computed in float64 and rounded once: ``W + A @ B``; under DoRA ``W * (1 + G) + A @ B``,
    which is what the branch adds to the output, less the bias.

    Args:
        data: path of the data file that the manifest's offsets are of.
        sites: module path -> site, with its weight.
        changes: what the adapter changes: low-rank pairs and gains only.

    Returns:
        initializer name -> OrtValue, in the initializer's layout and dtype.

    Raises:
        BundleError: the data file is missing or shorter than the manifest says, or the manifest
            contradicts itself.
    """
    by_weight: dict[str, list[str]] = {}
    for path in changes:
        by_weight.setdefault(_weight(sites[path]).name, []).append(path)
    merged: Values = {}
    for name, paths in by_weight.items():
        array = np.array(_read(data, _weight(sites[paths[0]])))
        for path in paths:
            site, own = sites[path], _weight(sites[path])
            whole = array.T if own.transposed else array  # a view: [in, width]
            columns = whole[:, own.start : own.start + site.out_features]
            if columns.shape != (site.in_features, site.out_features):
                raise BundleError(
                    f"the weight {name} {list(own.shape)} does not hold {path} "
                    f"[{site.in_features}, {site.out_features}] from {own.start}",
                    _AGAIN,
                )
            _change(columns, changes[path])
        merged[name] = ort.OrtValue.ortvalue_from_numpy(array)  # a view, which keeps the array
    return merged


def _change(weight: NDArray[np.floating], change: SiteChange) -> None:
    """Put one site's change into ``weight [in, out]``, some rows at a time."""
    gain = 0.0 if change.gain is None else change.gain.astype(np.float64)
    rows = max(1, _BLOCK // weight.shape[1])
    for first in range(0, len(weight), rows):
        some = slice(first, first + rows)
        wide = weight[some].astype(np.float64) * (1.0 + gain)
        if change.factors is not None:
            wide += delta(Factors(change.factors.A[some], change.factors.B))
        weight[some] = wide


def _read(data: Path, stored: WeightEntry) -> NDArray[np.floating]:
    try:
        return np.memmap(data, stored.dtype, "r", stored.offset, stored.shape)
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{data} has no {stored.name} {list(stored.shape)} at byte {stored.offset}: {error}",
            "The copy was cut off; copy the whole bundle folder again.",
        ) from error


def _weight(site: SiteEntry) -> WeightEntry:
    assert site.weight is not None  # it was checked when the adapter was pinned
    return site.weight


def _check_bundle(bundle: Bundle) -> None:
    manifest = bundle.manifest
    if manifest.mode == "merged":
        raise DataError(
            "nothing can be pinned in a merged bundle: its one adapter is in the weights already",
            "Leave pinned out: a merged bundle runs at that speed.",
        )
    if manifest.driver != "decoder":
        raise DataError(
            f"nothing can be pinned in a bundle for {manifest.task}: it has no graph without "
            "branches",
            "Leave pinned out, or export one adapter with mode='merged'.",
        )
    if BASE_GRAPH_FILE not in manifest.files:
        raise BundleError(
            f"nothing can be pinned: {bundle.directory} has no {BASE_GRAPH_FILE}", _AGAIN
        )


def _check(name: str, changes: Changes, bundle: Bundle) -> None:
    """Refuse an adapter that cannot be put into the base's weights."""
    manifest = bundle.manifest
    if manifest.adapters[name].invocation:
        raise _refused(name, "it is an activated LoRA, which works on its own tokens only")
    coded = () if manifest.quantization is None else manifest.quantization.layers
    if not coded and not any(site.weight for site in manifest.sites.values()):
        raise BundleError(
            f"adapter {name!r} cannot be pinned: the bundle does not say where its weights are",
            _AGAIN,
        )
    for path, change in changes.items():
        site = manifest.sites[path]
        carried = _unpinned_parts(change)
        if site.kind not in ("linear", "embedding") or carried:
            what = carried or f"the {site.kind} layer"
            raise _refused(name, f"it changes {what} {path}, which is no matrix of the base")
        if path in coded:
            raise _refused(name, f"the weight of {path} is rounded to {manifest.precision} codes")
        if site.weight is None:
            raise _refused(name, f"the weight of {path} is not in {DATA_FILE} as a float matrix")
        if site.weight.readers > 1:
            partner = next((x for x in manifest.tied if path in manifest.tied and x != path), "")
            shared = partner or "another layer"
            raise DataError(
                f"adapter {name!r} cannot be pinned: {path} shares its weight with {shared}, "
                "which would change too",
                "Leave it out of pinned, or export it with mode='merged', which unties them.",
            )


def _unpinned_parts(change: SiteChange) -> str:
    parts = {"the bias of": change.bias, "the norm": change.weight, "the task head": change.head}
    return next((what for what, part in parts.items() if part is not None), "")


def _refused(name: str, reason: str) -> DataError:
    return DataError(f"adapter {name!r} cannot be pinned: {reason}", _UNPIN)
