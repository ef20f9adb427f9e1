"""The largest number that a graph in float16 would have to hold, measured in float32.

The CPU computes much of such a graph in float32, so that an overflow is not seen in its outputs;
other providers have none of that. Knows nothing of PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_edge.maths.half import LARGEST_HALF
from lora_edge.parity.explain.rerun import rerun
from lora_edge.parity.record.golden import Golden
from lora_edge.runtime import Runner
from lora_edge.runtime.providers import open_like


class Largest(NamedTuple):
    """A number, and where it is: the layer or operator that makes it."""

    number: float
    where: str


class Ranges:
    """The exact graph of a bundle in float16, with the largest numbers of its values exposed."""

    def __init__(self, exact: Runner) -> None:
        """Open it, with the options of the bundle's session in float32."""
        from lora_edge.graph.ranges import RANGES, ranged  # its imports are not on a device

        self._exact, self._output = exact, RANGES
        graph = ranged(exact.bundle.directory / exact.graph_file)
        self._names = graph.values
        self._session = open_like(exact.session.session, graph.model, graph.folder)

    def largest(self, golden: Golden) -> Largest:
        """Over the prompts and continuations of a golden case.

        Where numbers overflow, it is that of the first value in the order of execution.
        """
        found = np.zeros(len(self._names), np.float32)

        def listen(_: int, values: Mapping[str, Any]) -> None:
            (sizes,) = self._session.run_with_ort_values([self._output], dict(values))
            np.maximum(found, np.nan_to_num(sizes.numpy(), nan=np.inf), out=found)

        rerun(self._exact, golden.probe, golden.tails, listen)
        over = np.flatnonzero(found > LARGEST_HALF)
        at = int(over[0]) if len(over) else int(found.argmax())
        return Largest(float(found[at]), self._names[at])
