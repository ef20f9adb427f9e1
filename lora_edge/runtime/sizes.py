"""Do the sizes that a manifest claims agree with the graph? Asked before anything is made of them.

Knows the shapes that ONNX Runtime reports; knows nothing of bundles or tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_edge.bundle.part import SiteEntry, StaticGraph
from lora_edge.errors import BundleError
from lora_edge.names import STACKED_PARTS, lora_input

Sizes = Mapping[str, Sequence[int | None]]
"""Name of an input or output -> its dimensions; None is any."""


def site_sizes(
    sites: Mapping[str, SiteEntry], *, by_row: bool = False, static: StaticGraph | None = None
) -> Sizes:
    """The sizes of the adapter inputs that the sites have; of A and B by row, with that axis.

    ``static``: the graph is this one, with fixed shapes.
    """
    rows = (None,) if by_row else ()
    rank = None if static is None else static.rank
    found: dict[str, Sequence[int | None]] = {}
    for path, site in sites.items():
        found[lora_input(path, "A")] = (*rows, site.in_features, rank)
        found[lora_input(path, "B")] = (*rows, rank, site.out_features)
        if static is not None:
            found[lora_input(path, "gate")] = (1, static.seq, 1)
        for part in STACKED_PARTS:
            found[lora_input(path, part)] = (None, site.out_features)
    return found


def check_sizes(shapes: Mapping[str, Sequence[Any]], sizes: Sizes, graph: Path) -> None:
    """Check that a graph's inputs and outputs have these sizes, where it says any.

    Args:
        shapes: name of an input or output -> its shape, as ``onnxruntime.NodeArg`` has it.
        sizes: what is expected of those that are named in it.
        graph: the graph's file, for the error.

    Raises:
        BundleError: the first that differs.
    """
    for name, shape in shapes.items():
        expected = sizes.get(name)
        if expected is None or not shape:  # a graph may leave a shape out
            continue
        pairs = zip(expected, shape, strict=False)
        if len(expected) != len(shape) or any(
            None not in (a, b) and not isinstance(b, str) and a != b for a, b in pairs
        ):
            said = ", ".join("any" if size is None else str(size) for size in expected)
            raise BundleError(
                f"{graph}: {name} is {shape}, but the manifest says [{said}]",
                "The graph and the manifest are of different bundles; copy the bundle again.",
            )
