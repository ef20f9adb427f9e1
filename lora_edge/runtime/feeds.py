"""An IO binding that is used again and again: what changes by step is written in place.

Knows arrays and names; knows nothing of adapters or caches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lora_edge.maths.lora import FloatArray


class Feeds:
    """An IO binding on a session, and the small inputs that it keeps alive.

    Args:
        session: an ``onnxruntime.InferenceSession``.
        values: input name -> OrtValue, bound for its life; whoever holds it keeps them alive.
        in_place: the session reads inputs where they are, at each run; else an input is copied to
            the provider's memory when it is bound, and is bound again for each run.

    Attributes:
        session: as given.
        io: the binding.
        buffers: which KV buffers are bound (:class:`~lora_edge.runtime.pool.Buffers.serial`).
    """

    def __init__(self, session: Any, values: Mapping[str, Any], *, in_place: bool) -> None:
        self.session = session
        self.io = session.io_binding()
        self.buffers: int | None = None
        self._in_place = in_place
        self._fed: dict[str, NDArray[Any]] = {}  # a binding does not keep its values alive
        self._written: FloatArray | None = None
        for name, value in values.items():
            self.io.bind_ortvalue_input(name, value)

    def feed(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """Give an input for the next runs, of any shape; returns what was fed, a copy of it."""
        fed = self._fed.get(name)
        if fed is not None and self._in_place and fed.shape == array.shape:
            fed[...] = array
            return fed
        own = self._fed[name] = np.array(array)
        self.io.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(own))
        return own

    def fed(self, name: str) -> NDArray[Any]:
        """What was fed last; where inputs are read in place, writing into it feeds it again."""
        return self._fed[name]

    def output(self, name: str, shape: tuple[int, ...]) -> FloatArray:
        """A new float32 array that the next run writes an output to."""
        self._written = None
        array = np.empty(shape, np.float32)
        self.io.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        return array

    def output_again(self, name: str, shape: tuple[int, ...]) -> FloatArray:
        """The same array for one run after another: what is to be kept of it must be copied."""
        if self._written is None or self._written.shape != shape:
            self._written = self.output(name, shape)
        return self._written

    def run(self) -> None:
        """Run the session on what is bound."""
        self.session.run_with_iobinding(self.io)
