"""Which graph a batch of text runs on: the smallest that gives what the switchable one gives.

No adapter on any row: the graph without branches. One adapter or blend on all rows: branches
without gates. Everything else, and adapters that begin at a token: the switchable graph. All read
one prepared file of weights, so that a session more costs some megabytes; it is opened when it is
first needed, and compared with the switchable one once on each device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.bundle.bundle import BASE_GRAPH_FILE, SINGLE_GRAPH_FILE, Bundle
from lora_edge.bundle.part import Part
from lora_edge.errors import BundleError
from lora_edge.runtime.adapters.active import ActiveAdapters
from lora_edge.runtime.adapters.binding import Binding, State
from lora_edge.runtime.decoder import Decoder

if TYPE_CHECKING:
    from lora_edge.runtime.prepared import PreparedGraphs

_COMPARED = 16  # tokens
_SHARE = 1e-3  # of an adapter's effect: what one layer of many may add to it
_ROUNDING = {"float32": 1e-5, "float16": 1e-2}  # of the logits; two graphs add up in two orders


class Routes:
    """The sessions on a bundle's smaller graphs.

    Args:
        bundle: the bundle, switchable, of a decoder with its cache.
        switchable: gives the session on the graph with branches.
        active: its adapters.
        prepared: where the graphs' weights are kept.
        options: of every session: provider, threads, ...
    """

    def __init__(
        self,
        bundle: Bundle,
        switchable: Callable[[], Decoder],
        active: ActiveAdapters,
        prepared: PreparedGraphs,
        options: Mapping[str, Any],
    ) -> None:
        self._bundle = bundle
        self._switchable = switchable
        self._active = active
        self._prepared = prepared
        self._options = options
        self._opened: dict[str, Decoder] = {}

    def find(self, states: Sequence[State]) -> Decoder | None:
        """The session for a batch, which is bound as for the switchable graph; None: on that.

        Args:
            states: the canonical state of every row.

        Raises:
            BundleError: a graph is damaged, or gives something else than the switchable one.
        """
        name = self._graph(states)
        if name not in self._bundle.manifest.files:  # an older bundle's
            return None
        if name not in self._opened:
            self._bundle.verify(name)
            decoder = Decoder(
                self._bundle.directory, {"decoder": self._part(name)}, **self._options
            )
            if not self._prepared.checked(name):
                bound = self._active.binding(dict(states[0]), 1)
                check_agrees(decoder, bound, self._switchable(), self._active, states[0], name)
                self._prepared.mark_checked(name)
            self._opened[name] = decoder
        return self._opened[name]

    def _graph(self, states: Sequence[State]) -> str:
        if len(set(states)) != 1:  # unlike rows, or none, which the switchable graph refuses
            return ""
        state = states[0]
        if not state:
            return BASE_GRAPH_FILE
        weighted = len(state) == 1 and state[0][1] != 1.0  # by the gate; a blend's are in B
        at_token = any(self._bundle.manifest.adapters[name].invocation for name, _ in state)
        return "" if weighted or at_token else SINGLE_GRAPH_FILE

    def _part(self, name: str) -> Part:
        part = self._bundle.manifest.parts["decoder"]
        if name == BASE_GRAPH_FILE:
            return dataclasses.replace(part, file=name, sites={})
        sites = {
            path: dataclasses.replace(site, parts=tuple(x for x in site.parts if x != "gate"))
            for path, site in part.sites.items()
        }
        return dataclasses.replace(part, file=name, sites=sites)


def check_agrees(
    decoder: Decoder,
    binding: Binding,
    switchable: Decoder,
    active: ActiveAdapters,
    state: State,
    what: str,
) -> None:
    """Compare a session with the switchable graph's, on one prompt.

    Where a weight is, and that ONNX Runtime takes another in its place, is what no hash tells.

    Args:
        decoder: the session, and ``binding``, what is bound to it.
        switchable: the other one.
        active: the bundle's adapters.
        state: of the one row.
        what: the session's graph, for people.

    Raises:
        BundleError: it gives something else.
    """
    count = min(_COMPARED, decoder.longest)
    rows = [np.random.default_rng(0).integers(0, decoder.part.vocab_size, count).tolist()]

    def logits(session: Decoder, binding: Binding) -> NDArray[np.float64]:
        return session.start(1, count, binding).extend_all(rows)[0].astype(np.float64)

    found = logits(decoder, binding)
    expected = logits(switchable, active.binding(dict(state), 1))
    effect = np.linalg.norm(expected - logits(switchable, active.binding(None, 1)))
    rounding = _ROUNDING[decoder.cache_dtype.name] * np.linalg.norm(expected)
    error = np.linalg.norm(found - expected)
    if not error <= max(_SHARE * effect, rounding):
        name = next((name for name, _ in state), "no adapter")
        raise BundleError(
            f"{what}, {name} does not give what it gives on the switchable graph: off by "
            f"{error:.2g} where its effect is {effect:.2g}",
            "Export the bundle again, or report it, with the provider's name.",
        )
