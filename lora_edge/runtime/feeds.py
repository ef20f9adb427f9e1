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
        self._fed: dict[str, tuple[NDArray[Any], Any]] = {}
        for name, value in values.items():
            self.io.bind_ortvalue_input(name, value)

    def feed(self, name: str, array: NDArray[Any]) -> None:
        """Give an input for the next run, of any shape; the array may be changed afterwards."""
        fed = self._fed.get(name)
        if fed is not None and self._in_place and fed[0].shape == array.shape:
            fed[0][...] = array
            return
        own = np.array(array)
        value = ort.OrtValue.ortvalue_from_numpy(own)
        self._fed[name] = own, value
        self.io.bind_ortvalue_input(name, value)

    def output(self, name: str, shape: tuple[int, ...]) -> FloatArray:
        """A new float32 array that the next run writes an output to."""
        array = np.empty(shape, np.float32)
        self.io.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        return array

    def run(self) -> None:
        """Run the session on what is bound."""
        self.session.run_with_iobinding(self.io)
