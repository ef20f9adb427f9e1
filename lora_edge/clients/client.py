"""A bundle in another runtime: the same questions, whatever answers them.

The driver's side of the talk is described in ``docs/clients.md``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.clients.process import Process
from lora_edge.errors import BundleError

State = Mapping[str, float]
"""What is active on a row: empty, or adapter -> weight."""

_NOT_A_NUMBER = "Its driver and this release do not fit; see docs/clients.md."


class Client:
    """A driver's process with a bundle open.

    Args:
        name: of the runtime.
        command: what starts the driver.
        bundle: the bundle's folder.
        graph: path in the bundle of the graph to run.

    Attributes:
        about: the runtime and its version.
        can: what it takes: of ``batch``, ``mixed``, ``blend``, ``rests``, ``encode``.

    Raises:
        ProcessError: it cannot be started, or cannot open the bundle.
    """

    def __init__(self, name: str, command: Sequence[str], bundle: Path, graph: str) -> None:
        self.name = name
        self._process = Process(name, command)
        self._answers = tempfile.TemporaryDirectory(prefix="lora-edge-client-")
        self._file = Path(self._answers.name) / "answer"
        try:
            told = self._process.ask("open", bundle=str(bundle.resolve()), graph=graph)
        except BaseException:
            self.close()
            raise
        self.about = str(told["about"])
        self.can = frozenset(map(str, told.get("can", ())))

    def start(self, states: Sequence[State], sequence: int = 0) -> None:
        """Begin a batch with an empty cache; the one of that number from before is gone."""
        self._process.ask("start", states=[dict(state) for state in states], sequence=sequence)

    def extend(
        self, rows: Sequence[Sequence[int]], *, every: bool, sequence: int = 0
    ) -> list[NDArray[np.float32]]:
        """Append tokens to the rows of a batch; a row without tokens rests.

        Returns:
            Of each row ``[tokens, vocab]``, the logits after each new token, or after the last.
        """
        given = [list(map(int, row)) for row in rows]
        return self._arrays(self._ask("extend", rows=given, every=every, sequence=sequence))

    def outputs(
        self, rows: Sequence[Mapping[str, NDArray[Any]]], states: Sequence[State]
    ) -> list[NDArray[np.float32]]:
        """A model without a cache: ``[labels]`` of each row, or ``[tokens, size]``.

        Args:
            rows: of each its inputs by name, without the batch's axis and without padding.
            states: what is active on each.
        """
        given = [{name: array.tolist() for name, array in row.items()} for row in rows]
        asked = self._ask("outputs", rows=given, states=[dict(state) for state in states])
        return self._arrays(asked)

    def encode(self, text: str, adapter: str | None = None) -> list[int]:
        """The runtime's own token ids of a text."""
        return [int(x) for x in self._process.ask("encode", text=text, adapter=adapter)["ids"]]

    def _ask(self, do: str, **more: Any) -> Mapping[str, Any]:
        return self._process.ask(do, file=str(self._file), **more)

    def _arrays(self, told: Mapping[str, Any]) -> list[NDArray[np.float32]]:
        shapes = [tuple(map(int, shape)) for shape in told["shapes"]]
        sizes = [int(np.prod(shape)) for shape in shapes]
        numbers = np.fromfile(self._file, np.float32)
        if len(numbers) != sum(sizes):
            raise BundleError(
                f"{self.name} gave {len(numbers)} numbers for outputs of {shapes}", _NOT_A_NUMBER
            )
        parts = np.split(numbers, np.cumsum(sizes)[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def close(self) -> None:
        """End it."""
        self._process.close()
        self._answers.cleanup()
