"""Adapters of unlike rows one under the other: each row is multiplied with its own pairs.

Where a graph has no axis of rows, adapters lie side by side along the rank, every row computes all
of them, and gates choose. Here a row computes its own alone, at the price of a copy of its factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lora_edge.bundle.part import SiteEntry
from lora_edge.maths.lora import FloatArray, SiteChange
from lora_edge.names import SELECT, STACKED_PARTS, lora_input
from lora_edge.runtime.adapters.binding import Changes, State

_ROW = 6
"""To read factors of one's own costs a row what it costs so many rows to compute one adapter more,
with rank 16 and 135 million parameters."""


def pays(states: Sequence[State]) -> bool:
    """Whether rows in these states are faster by row than with gates, where both can be done."""
    rows, unlike = len(states), len(set(states) - {()})
    return unlike * (rows + _ROW) >= _ROW * rows


def stacked(sites: Mapping[str, SiteEntry], changes: Sequence[Changes]) -> dict[str, FloatArray]:
    """What a graph by row is fed for rows of these changes, one for each row.

    Args:
        sites: module path -> site.
        changes: what the adapter of each row changes there.

    Returns:
        ``lora.<path>.A [rows, in, rank]`` and ``B [rows, rank, out]``, filled up with zeros to the
        largest rank; ``[1, …, 0]`` where no row changes anything. Vectors ``[rows, size]``, and
        ``lora.select [rows, 1, rows]``, which gives each row its own.
    """
    arrays: dict[str, FloatArray] = {}
    selects = False
    for path, site in sites.items():
        own = [change.get(path, SiteChange()) for change in changes]
        if "A" in site.parts:
            rank = max(change.rank for change in own)
            rows = len(own) if rank else 1
            a = np.zeros((rows, site.in_features, rank), np.float32)
            b = np.zeros((rows, rank, site.out_features), np.float32)
            for row, change in enumerate(own):
                if change.factors is not None and change.rank:
                    a[row, :, : change.rank] = change.factors.A
                    b[row, : change.rank] = change.factors.B
            arrays[lora_input(path, "A")], arrays[lora_input(path, "B")] = a, b
        for part in STACKED_PARTS:
            if part in site.parts:
                selects = True
                vectors = np.zeros((len(own), site.out_features), np.float32)
                for row, change in enumerate(own):
                    vector = change.stacked()[part]
                    if vector is not None:
                        vectors[row] = vector
                arrays[lora_input(path, part)] = vectors
    if selects:
        arrays[SELECT] = np.eye(len(changes), dtype=np.float32)[:, None]
    return arrays
