"""The two ways in which a graph keeps its KV cache: one buffer, or past in and past and new out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast, final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lora_edge.maths.lora import FloatArray
from lora_edge.runtime.adapters.binding import Binding, Values
from lora_edge.runtime.decoding import CachedDecoding, Chunk, Decoding, IntArray, Rows
from lora_edge.runtime.pool import give_back, take_buffers

if TYPE_CHECKING:
    from lora_edge.runtime.decoder import Decoder

_MASK_STEP = 64  # positions by which the mask of a step grows


@final
class SharedCache(CachedDecoding):
    """One buffer of ``max_length`` positions or more per layer: present is bound onto past, nothing
    is copied.

    For GroupQueryAttention: padding on the right only; what lies behind a row's end is overwritten
    by its next tokens.
    """

    def __init__(
        self, decoder: Decoder, batch: int, max_length: int, binding: Binding, context: Values
    ) -> None:
        super().__init__(decoder, batch, max_length, binding, context)
        buffers = take_buffers(decoder, batch, max_length, self._io.buffers)
        self.cache, self._arrays = buffers.values, buffers.arrays
        if self._io.buffers != buffers.serial:
            self._bind_cache(self._io.io, self.cache)
            self._io.buffers = buffers.serial
        self._room = buffers.length
        self._steady = False  # the run before was a step of all rows
        if decoder.pools:
            give_back(self, decoder, buffers, self._io, binding.spare)

    def _bind_cache(self, io: Any, cache: Sequence[Any]) -> None:
        names = zip(self.decoder.past_names, self.decoder.present_names, cache, strict=True)
        for past, present, value in names:
            io.bind_ortvalue_input(past, value)
            io.bind_ortvalue_output(present, value)

    def step(self, tokens: Sequence[int | None]) -> FloatArray:
        logits = self._step(tokens)
        return self._any_step(tokens) if logits is None else logits.copy()

    def advance(self, tokens: Sequence[int | None]) -> FloatArray:
        logits = self._step(tokens)
        return self._any_step(tokens) if logits is None else logits

    def _any_step(self, tokens: Sequence[int | None]) -> FloatArray:
        logits = super().step(tokens)
        whole = None not in tokens and self.binding.token_gates is None
        self._steady = whole and self.decoder.pools
        return logits

    def _step(self, tokens: Sequence[int | None]) -> FloatArray | None:
        """A step like the one before, with everything but its numbers bound already.

        A step reads all weights, and what the processor's caches held of this program goes. What
        costs is not how long this runs when it is warm, but how much of numpy and ONNX Runtime it
        touches: so the inputs are written in place, and the mask has room for the next steps. Zeros
        behind all rows' ends are what the longer rows of a batch are to the shorter ones.

        Returns:
            ``[batch, vocab] float32``, which the next step overwrites; None where this is no such
            step, or one to be refused.
        """
        if not self._steady or None in tokens:
            return None
        given = cast("Sequence[int]", tokens)
        decoder, io, history = self.decoder, self._io, self.history
        vocabulary = decoder.part.vocab_size
        if len(given) != self.batch:
            return None
        for token, old in zip(given, history, strict=True):
            if not 0 <= token < vocabulary or len(old) >= self.max_length:
                return None
        mask, total = io.fed("attention_mask"), max(map(len, history)) + 1
        if mask.shape[1] < total:
            width = min(-(-total // _MASK_STEP) * _MASK_STEP, self._room)
            mask = np.zeros((self.batch, width), np.int64)
            for row, old in zip(mask, history, strict=True):
                row[: len(old)] = 1
            mask = io.feed("attention_mask", mask)
        ids = io.fed("input_ids")
        positions = io.fed("position_ids") if "position_ids" in decoder.inputs else None
        for index, (token, old) in enumerate(zip(given, history, strict=True)):
            end = len(old)
            ids[index, 0] = token
            mask[index, end] = 1
            if positions is not None:
                positions[index, 0] = end
        logits = io.output_again("logits", (self.batch, 1, vocabulary))
        io.run()
        for token, old in zip(given, history, strict=True):
            old.append(token)
        return logits[:, 0]

    def keys_and_values(self, row: int, spans: Sequence[tuple[int, int]]) -> Sequence[NDArray[Any]]:
        return [np.stack([array[row, :, a:b] for array in self._arrays]) for a, b in spans]

    def _restore(self, kept: Sequence[Sequence[NDArray[Any]]]) -> None:
        for index, blocks in enumerate(kept):
            _write(self._arrays, index, 0, blocks)

    def _feed(self, rows: Rows, every: bool) -> list[FloatArray]:
        self._steady = False
        if not any(self.history) or self.batch == 1 or max(len(row) for row in rows) == 1:
            return self._run(self._io, self._chunk(rows, self.history), every)
        # GroupQueryAttention takes a past and several new tokens for one row only.
        if self._arrays:
            return [self._feed_row(index, row, every) for index, row in enumerate(rows)]
        return self._feed_by_token(rows, every)

    def _feed_row(self, index: int, row: Sequence[int], every: bool) -> FloatArray:
        views = [
            ort.OrtValue.ortvalue_from_numpy(array[index : index + 1]) for array in self._arrays
        ]
        binding = self.binding.row(index)
        io = self._bind_adapters(binding)
        io.buffers = None
        self._bind_cache(io.io, views)
        chunk = self._chunk([row], [self.history[index]])._replace(row=index)
        logits = self._run(io, chunk, every)[0]
        if not self.context:
            binding.spare.append(io)
        return logits

    def _feed_by_token(self, rows: Rows, every: bool) -> list[FloatArray]:
        """For a cache in device memory, of which no row view can be had."""
        history = [list(row) for row in self.history]
        logits: list[list[FloatArray]] = [[] for _ in rows]
        for column in range(max(len(row) for row in rows)):
            tokens = [row[column : column + 1] for row in rows]
            step = self._run(self._io, self._chunk(tokens, history), False)
            for index, token in enumerate(tokens):
                history[index].extend(token)
                if token:
                    logits[index].append(step[index])
        return [np.concatenate(row if every else row[-1:]) for row in logits]

    def _chunk(self, rows: Rows, history: Rows) -> Chunk:
        # A resting row writes its last token into its own place again: same token, same values.
        feed = [row if row else old[-1:] for row, old in zip(rows, history, strict=True)]
        total = [len(old) + len(row) for row, old in zip(rows, history, strict=True)]
        width = max(len(row) for row in feed)
        ids = np.zeros((len(feed), width), np.int64)
        mask = np.zeros((len(feed), max(total)), np.int64)
        positions = np.zeros((len(feed), width), np.int64)
        for index, (row, end) in enumerate(zip(feed, total, strict=True)):
            ids[index, : len(row)] = row
            mask[index, :end] = 1
            positions[index] = np.minimum(np.arange(width) + end - len(row), end - 1)
        return Chunk(ids, mask, positions, [0] * len(feed), [len(row) for row in feed])


@final
class ConcatenatedCache(CachedDecoding):
    """Past in, past and new out: each run's presents are the next run's pasts.

    The presents are bound to values of ours: what a binding allocates dies with its outputs in ONNX
    Runtime before 1.30, whoever else still holds it.

    Portable graphs find a token's position from the mask, so gaps between the tokens of a row do no
    harm. Foreign graphs may count gaps as tokens: where one would arise, the sequences are run
    again.
    """

    def __init__(
        self, decoder: Decoder, batch: int, max_length: int, binding: Binding, context: Values
    ) -> None:
        super().__init__(decoder, batch, max_length, binding, context)
        part = decoder.part
        self._gaps = part.form == "portable"
        self._left = part.padding == "left" or (part.padding == "either" and not self._gaps)
        self._clear()

    def _clear(self) -> None:
        cache = self.decoder.kept
        empty = np.zeros((self.batch, cache.kv_heads, 0, cache.head_dim), self.decoder.cache_dtype)
        self._past = [ort.OrtValue.ortvalue_from_numpy(empty) for _ in self.decoder.past_names]
        self._mask: IntArray = np.zeros((self.batch, 0), np.int64)

    def keys_and_values(self, row: int, spans: Sequence[tuple[int, int]]) -> Sequence[NDArray[Any]]:
        if not spans:
            return []
        slots = np.flatnonzero(self._mask[row])
        whole = np.stack([value.numpy()[row][:, slots] for value in self._past])
        return [whole[:, :, a:b].copy() for a, b in spans]

    def _restore(self, kept: Sequence[Sequence[NDArray[Any]]]) -> None:
        cache = self.decoder.kept
        lengths = [sum(block.shape[2] for block in blocks) for blocks in kept]
        width = max(lengths)
        shape = self.batch, cache.kv_heads, width, cache.head_dim
        arrays = [np.zeros(shape, self.decoder.cache_dtype) for _ in self._past]
        self._mask = np.zeros((self.batch, width), np.int64)
        for index, (blocks, length) in enumerate(zip(kept, lengths, strict=True)):
            first = width - length if self._left else 0
            self._mask[index, first : first + length] = 1
            _write(arrays, index, first, blocks)
        self._past = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays]

    def _present(self, length: int) -> Any:
        """Room for the keys or values of one layer: ``[batch, kv_heads, length, head_dim]``."""
        cache = self.decoder.kept
        shape = [self.batch, cache.kv_heads, length, cache.head_dim]
        kind, device = self.decoder.cache_dtype.type, self.decoder.provider.target.memory
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, kind, device)

    def _feed(self, rows: Rows, every: bool) -> list[FloatArray]:
        width = max(len(row) for row in rows)
        started = self._mask.shape[1] > 0
        gap = (
            any(
                row and (len(row) < width or not m[-1])
                for row, m in zip(rows, self._mask, strict=True)
            )
            if started
            else False
        )
        if not gap or self._gaps:
            return self._advance(rows, self.lengths, every)
        self._clear()
        whole = [[*old, *row] for old, row in zip(self.history, rows, strict=True)]
        logits = self._advance(whole, [0] * self.batch, every)
        return [values[-max(len(row), 1) :] for values, row in zip(logits, rows, strict=True)]

    def _advance(self, rows: Rows, start: Sequence[int], every: bool) -> list[FloatArray]:
        width = max(len(row) for row in rows)
        ids = np.zeros((self.batch, width), np.int64)
        new = np.zeros((self.batch, width), np.int64)
        positions = np.zeros((self.batch, width), np.int64)
        first = [width - len(row) if self._left and row else 0 for row in rows]
        for index, row in enumerate(rows):
            span = slice(first[index], first[index] + len(row))
            ids[index, span] = row
            new[index, span] = 1
            place = np.arange(width) - first[index] + start[index]
            positions[index] = np.clip(place, 0, max(start[index] + len(row) - 1, 0))
        mask = np.concatenate([self._mask, new], axis=1)
        presents = [self._present(mask.shape[1]) for _ in self._past]
        names = zip(self.decoder.past_names, self.decoder.present_names, strict=True)
        for (past, present), old, new_value in zip(names, self._past, presents, strict=True):
            self._io.io.bind_ortvalue_input(past, old)
            self._io.io.bind_ortvalue_output(present, new_value)
        chunk = Chunk(ids, mask, positions, first, [len(row) for row in rows])
        logits = self._run(self._io, chunk, every)
        self._past = presents
        self._mask = mask
        return logits


@final
class NoCache(Decoding):
    """Nothing is kept: each step runs the whole of every row again.

    The graph is causal: what pads a row on the right is seen by no token of it.
    """

    def _feed(self, rows: Rows, every: bool) -> list[FloatArray]:  # noqa: ARG002
        whole = [[*old, *row] for old, row in zip(self.history, rows, strict=True)]
        lengths = [len(row) for row in whole]
        shape = self.batch, max(lengths)
        ids = np.full(shape, self.decoder.part.pad_token_id, np.int64)
        for index, row in enumerate(whole):
            ids[index, : len(row)] = row
        columns = np.arange(shape[1])
        mask = (columns < np.array(lengths)[:, None]).astype(np.int64)
        positions = np.broadcast_to(columns, shape).astype(np.int64)
        chunk = Chunk(ids, mask, positions, [0] * self.batch, lengths)
        found = self._run(self._io, chunk, every=True)
        return [values[-max(len(row), 1) :] for values, row in zip(found, rows, strict=True)]


def _write(
    arrays: Sequence[NDArray[Any]], row: int, first: int, blocks: Sequence[NDArray[Any]]
) -> None:
    """Write blocks one behind the other into the arrays of keys and values, from a place on."""
    for block in blocks:
        end = first + block.shape[2]
        for array, values in zip(arrays, block, strict=True):
            array[row, :, first:end] = values
        first = end
