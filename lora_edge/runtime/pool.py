"""KV buffers and IO bindings of finished decodings, for the next ones.

A buffer is not zeroed in between: GroupQueryAttention reads no position behind a row's end, and
what a row has not written yet lies there.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lora_edge.runtime.adapters.binding import Binding
from lora_edge.runtime.feeds import Feeds
from lora_edge.runtime.resident import BUFFERS, Key

if TYPE_CHECKING:
    from lora_edge.runtime.decoder import Decoder
    from lora_edge.runtime.resident import SizedCache

_STEP = 256  # lengths are rounded up to it, so that requests of unlike lengths share buffers
_serial = itertools.count()


@dataclass(frozen=True, eq=False)
class Buffers:
    """Keys and values of every layer.

    Attributes:
        values: ``[batch, kv_heads, length, head_dim]``, in the order of ``Decoder.past_names``.
        arrays: the same as arrays, where they are the CPU's.
        batch: rows.
        length: positions of each.
        serial: tells it from all others.
    """

    values: list[Any]
    arrays: list[NDArray[Any]]
    batch: int
    length: int
    serial: int = field(default_factory=lambda: next(_serial))

    def key(self, decoder: Decoder) -> Key:
        """What it is kept by: nobody but the decoder's next decodings takes it."""
        return BUFFERS, decoder.serial, self.batch, self.length, self.serial


def take_buffers(decoder: Decoder, batch: int, length: int, bound: int | None) -> Buffers:
    """Buffers of at least a length: those that are bound already, the shortest free, or new ones.

    Args:
        decoder: whose cache it is.
        batch: rows.
        length: positions that are needed.
        bound: serial of the buffers that would be taken with the least work.

    Raises:
        MemoryError: new ones do not fit.
    """

    def best(key: Key) -> int | None:
        if key[:3] != (BUFFERS, decoder.serial, batch):
            return None
        own: int = key[3]  # type: ignore[assignment]
        return None if own < length else 0 if key[4] == bound else own

    found: Buffers | None = decoder.resident.take(best) if decoder.pools else None
    if found is not None:
        return found
    if decoder.pools:
        length = max(length, min(-(-length // _STEP) * _STEP, decoder.longest))
    cache, device = decoder.kept, decoder.provider.target.memory
    shape = batch, cache.kv_heads, length, cache.head_dim
    arrays = [np.zeros(shape, decoder.cache_dtype) for _ in decoder.past_names]
    values = [ort.OrtValue.ortvalue_from_numpy(array, device) for array in arrays]
    # On the CPU an OrtValue is a view of its array.
    return Buffers(values, arrays if device == "cpu" else [], batch, length)


def give_back(user: object, decoder: Decoder, buffers: Buffers, feeds: Feeds, spare: Any) -> None:
    """Give buffers and an IO binding back when their user is gone.

    Args:
        user: a decoding.
        decoder: where it runs.
        buffers: its buffers.
        feeds: its IO binding, with these buffers bound.
        spare: where the IO binding goes.
    """
    size = sum(array.nbytes for array in buffers.arrays)
    kept = buffers.key(decoder), buffers, size
    weakref.finalize(user, _give_back, decoder.resident, kept, feeds, spare).atexit = False


def _give_back(cache: SizedCache, kept: tuple[Key, Buffers, int], feeds: Feeds, spare: Any) -> None:
    spare.append(feeds)
    cache.give_back(*kept)


def take_feeds(binding: Binding, session: Any) -> Feeds | None:
    """An IO binding of a session to which a binding is bound already, if there is one."""
    while True:
        try:
            found: Feeds = binding.spare.pop()
        except IndexError:
            return None
        if found.session is session:  # another may have taken its place
            return found
