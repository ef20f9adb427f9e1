"""Which graph a batch of text runs on: the smallest that gives what the switchable one gives.

No adapter on any row: the graph without branches. One adapter or blend on all rows: branches
without gates. Unlike rows, if there are many adapters among few rows: pairs for each row.
Everything else, and adapters that begin at a token: the switchable graph. All read
one prepared file of weights, so that a session more costs some megabytes; it is opened when it is
first needed, and compared with the switchable one once on each device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.bundle.bundle import (
    BASE_GRAPH_FILE,
    ROWS_GRAPH_FILE,
    SINGLE_GRAPH_FILE,
    Bundle,
)
from lora_edge.bundle.part import Part
from lora_edge.errors import BundleError
from lora_edge.runtime.adapters.active import ActiveAdapters
from lora_edge.runtime.adapters.binding import Binding, State
from lora_edge.runtime.adapters.by_row import pays
from lora_edge.runtime.decoder import Decoder

if TYPE_CHECKING:
    from lora_edge.runtime.native.library import Native
    from lora_edge.runtime.prepared import PreparedGraphs

_COMPARED = 16  # tokens
_SHARE = 1e-3  # of an adapter's effect: what one layer of many may add to it
_ROUNDING = {"float32": 1e-5, "float16": 1e-2}  # of the logits; two graphs add up in two orders
# Where activations are rounded to int8, a last bit is another code: as much as the drift may be.
_CODED = 0.1


@dataclass
class Routes:
    """The sessions on a bundle's smaller graphs.

    Attributes:
        bundle: the bundle, switchable, of a decoder with its cache.
        switchable: gives the session on the graph with branches.
        active: its adapters.
        prepared: where the graphs' weights are kept.
        options: of every session: provider, threads, ...
        native: the native library, where it is built and wanted: graphs with branches and without
            gates run in its form.
    """

    bundle: Bundle
    switchable: Callable[[], Decoder]
    active: ActiveAdapters
    prepared: PreparedGraphs
    options: Mapping[str, Any]
    native: Native | None = None
    _opened: dict[str, Decoder] = field(default_factory=dict)

    def find(self, states: tuple[State, ...]) -> tuple[Decoder, Binding] | None:
        """The session for a batch, and its binding; None: on the switchable graph.

        Args:
            states: the canonical state of every row.

        Raises:
            BundleError: a graph is damaged, or gives something else than the switchable one.
        """
        name = self._graph(states)
        if name not in self.bundle.manifest.files:  # an older bundle's
            return None
        by_row = name == ROWS_GRAPH_FILE
        bound = self.active.by_row(states) if by_row else self.active.binding_of(states)
        if name not in self._opened:
            self.bundle.verify(name)
            parts = {"decoder": self._part(name)}
            native = None if name == BASE_GRAPH_FILE else self.native
            decoder = Decoder(
                self.bundle.directory, parts, by_row=by_row, native=native, **self.options
            )
            form = "" if native is None else native.form.name
            if not self.prepared.checked(name, form):
                what = f"{name} in its {form} form" if form else name
                check_agrees(decoder, bound, self.switchable(), self.active, states, what)
                self.prepared.mark_checked(name, form)
            self._opened[name] = decoder
        return self._opened[name], bound

    def _graph(self, states: Sequence[State]) -> str:
        used = {name for state in states for name, _ in state}
        if not states or any(self.bundle.manifest.adapters[x].invocation for x in used):
            return ""  # no rows are refused there, as ever
        state = states[0]
        if len(set(states)) > 1:
            return ROWS_GRAPH_FILE if pays(states) else ""
        if not state:
            return BASE_GRAPH_FILE
        weighted = len(state) == 1 and state[0][1] != 1.0  # by the gate; a blend's are in B
        return "" if weighted else SINGLE_GRAPH_FILE

    def _part(self, name: str) -> Part:
        part = self.bundle.manifest.parts["decoder"]
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
    states: Sequence[State],
    what: str,
) -> None:
    """Compare a session with the switchable graph's, on one prompt.

    Where a weight is, and that ONNX Runtime takes another in its place, is what no hash tells.

    Args:
        decoder: the session, and ``binding``, what is bound to it.
        switchable: the other one.
        active: the bundle's adapters.
        states: of the rows; alike, they are compared by one.
        what: the session's graph, for people.

    Raises:
        BundleError: it gives something else.
    """
    states = tuple(states) if binding.batch else (states[0],)
    count = min(_COMPARED, decoder.longest)
    row = np.random.default_rng(0).integers(0, decoder.part.vocab_size, count).tolist()

    def logits(session: Decoder, binding: Binding) -> NDArray[np.float64]:
        rows = [row] * len(states)
        found = session.start(len(rows), count, binding).extend_all(rows)
        return np.stack(found).astype(np.float64)

    found = logits(decoder, binding)
    expected = logits(switchable, active.binding_of(states))
    off = logits(switchable, active.binding(None, len(states)))
    for state, own, wanted, base in zip(states, found, expected, off, strict=True):
        effect = np.linalg.norm(wanted - base)
        rounding = _ROUNDING[decoder.cache_dtype.name] * np.linalg.norm(wanted)
        limit = max(_SHARE * effect, rounding)
        if decoder.part.exact:
            limit = max(limit, _CODED * effect)
        error = np.linalg.norm(own - wanted)
        if not error <= limit:
            name = next((name for name, _ in state), "no adapter")
            raise BundleError(
                f"{what}, {name} does not give what it gives on the switchable graph: off by "
                f"{error:.2g} where its effect is {effect:.2g}",
                "Export the bundle again, or report it, with the provider's name.",
            )
