"""What is bound to a graph with fixed shapes: pairs of one rank, and gates for every token.

Knows names and tensors; knows nothing of bundles or sessions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lora_edge.bundle.part import SiteEntry, StaticGraph
from lora_edge.errors import DataError
from lora_edge.maths.lora import SiteChange, widened, wider
from lora_edge.runtime.adapters.binding import Changes, Tensors, Values


class PaddedTensors(Tensors):
    """The OrtValues of a graph with fixed shapes: what is narrower is padded with zeros.

    Args:
        sites: module path -> site.
        device: memory of the tensors.
        static: what is fixed.
    """

    one_row = True

    def __init__(self, sites: Mapping[str, SiteEntry], device: str, static: StaticGraph) -> None:
        super().__init__(sites, device)
        self._rank = static.rank
        self._seq = static.seq

    @property
    def _views(self) -> bool:
        """Pairs are copies, but for those of the graph's own rank."""
        return False

    def check_fits(self, changes: Changes, who: str) -> None:
        """Check that the graph has room for an adapter's or a blend's pairs; ``who`` names it.

        Raises:
            DataError: it has not; the layer and both ranks are named.
        """
        found = wider(changes, self._rank)
        if found is not None:
            raise DataError(
                f"{who} has rank {found[1]} at {found[0]}, and the graph with fixed shapes has "
                f"room for {self._rank}",
                f"Export with --rank {max(x.rank for x in changes.values())}, or run it on the "
                "graph without fixed shapes.",
            )

    def changes(self, together: Changes, stacked: Sequence[Changes]) -> Values:
        return super().changes({path: self._wide(x) for path, x in together.items()}, stacked)

    def weight(self, weight: float) -> Values:
        gate = self.value(np.full((1, self._seq, 1), weight, np.float32))
        return super().weight(weight) | dict.fromkeys(self.gates, gate)

    def _wide(self, change: SiteChange) -> SiteChange:
        if change.factors is None or change.rank == self._rank:
            return change
        return change._replace(factors=widened(change.factors, self._rank))
