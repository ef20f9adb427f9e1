"""Decoding on a graph with fixed shapes: one row, ``seq`` tokens a run, a cache of ``past`` places.

A run computes ``seq`` tokens whatever it is asked for: fewer are padded on the right, and masked.
Their keys and values are copied into the cache, in the places of their positions. Tokens that no
longer fit in there are run again with each new one, which costs nothing: a run is as long as ever.
So a row may have ``past + seq`` tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import numpy as np
import onnxruntime as ort

from lora_edge.maths.lora import FloatArray
from lora_edge.runtime.adapters.binding import Binding, Values
from lora_edge.runtime.decoding import Chunk, Decoding, Rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_edge.bundle.part import StaticGraph
    from lora_edge.runtime.decoder import Decoder


@final
class StaticCache(Decoding):
    """One row."""

    def __init__(
        self, decoder: Decoder, batch: int, max_length: int, binding: Binding, context: Values
    ) -> None:
        super().__init__(decoder, batch, max_length, binding, context)
        self._static = static_of(decoder)
        cache = decoder.kept
        sizes = {"past": self._static.past, "present": self._static.seq}
        shapes = {name: (1, cache.kv_heads, size, cache.head_dim) for name, size in sizes.items()}
        # Zeros, not what lay there: a masked score is no NaN, and NaN times zero would be one.
        self._past = [np.zeros(shapes["past"], decoder.cache_dtype) for _ in decoder.past_names]
        self._new = [np.zeros(shapes["present"], decoder.cache_dtype) for _ in decoder.past_names]
        self._bind_cache()

    def _bind_cache(self) -> None:
        io = self._io.io
        for name, array in zip(self.decoder.past_names, self._past, strict=True):
            io.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, array in zip(self.decoder.present_names, self._new, strict=True):
            io.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))

    def _feed(self, rows: Rows, every: bool) -> list[FloatArray]:
        (row,), (history,) = rows, self.history
        whole, end = [*history, *row], len(history)
        found: list[FloatArray] = []
        while end < len(whole):
            kept = min(end, self._static.past)
            chunk = whole[kept : kept + self._static.seq]
            logits = self._run_chunk(kept, chunk)
            found.append(logits[end - kept :] if every else logits[-1:])
            end = kept + len(chunk)
        return [np.concatenate(found) if every else found[-1]]

    def _run_chunk(self, kept: int, tokens: Sequence[int]) -> FloatArray:
        """Run tokens behind those in the cache, and keep what they leave.

        Args:
            kept: tokens in the cache that they follow.
            tokens: up to ``seq``.

        Returns:
            ``[tokens, vocab]``, the logits after each of them.
        """
        seq, past, count = self._static.seq, self._static.past, len(tokens)
        ids = np.zeros((1, seq), np.int64)
        mask = np.zeros((1, past + seq), np.int64)
        positions = np.full((1, seq), kept + count - 1, np.int64)
        ids[0, :count] = tokens
        mask[0, :kept] = mask[0, past : past + count] = 1
        positions[0, :count] = np.arange(kept, kept + count)
        if not self.decoder.pools:  # what is bound may have been copied
            self._bind_cache()
        (logits,) = self._run(self._io, Chunk(ids, mask, positions, [0], [count]), every=True)
        room = min(count, past - kept)
        for place, new in zip(self._past, self._new, strict=True):
            place[:, :, kept : kept + room] = new[:, :, :room]
        return logits


@final
class StaticRows(Decoding):
    """Several rows, which run one after the other, each with adapters of its own."""

    def __init__(
        self, decoder: Decoder, batch: int, max_length: int, binding: Binding, context: Values
    ) -> None:
        super().__init__(decoder, batch, max_length, binding, context)
        self._rows = [
            StaticCache(decoder, 1, max_length, binding.row(index), context)
            for index in range(batch)
        ]

    def _feed(self, rows: Rows, every: bool) -> list[FloatArray]:
        resting = np.zeros((1, self.decoder.part.vocab_size), np.float32)
        found = []
        for one, row in zip(self._rows, rows, strict=True):
            if not row:
                found.append(resting)
            else:
                found.append(one.extend_all([row])[0] if every else one.extend([row]))
        return found


def static_of(decoder: Decoder) -> StaticGraph:
    """What is fixed of a decoder's graph.

    Raises:
        ValueError: nothing is.
    """
    if decoder.static is None:
        raise ValueError("this decoder's graph has no fixed shapes")
    return decoder.static
