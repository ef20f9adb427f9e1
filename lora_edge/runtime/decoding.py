"""A batch of sequences in a decoder: token ids in, logits out, the KV cache in between.

The cache belongs to one :class:`Decoding`, and a Decoding to one binding of adapters: another
adapter in the middle of a sequence means another Decoding. Rows may have unequal lengths; how they
are padded is the graph's affair (``Part.padding``) and never seen from outside. What else a graph
reads, the same at every step, is its context.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_edge.errors import DataError
from lora_edge.maths.lora import FloatArray
from lora_edge.names import LOGITS_POSITIONS, NUM_LOGITS_TO_KEEP, lora_input
from lora_edge.runtime.adapters.binding import Binding, Values
from lora_edge.runtime.feeds import Feeds
from lora_edge.runtime.pool import take_feeds

if TYPE_CHECKING:
    from lora_edge.runtime.decoder import Decoder

IntArray = NDArray[np.int64]
Rows = Sequence[Sequence[int]]


class Chunk(NamedTuple):
    """New tokens of all rows, laid out for one run.

    Attributes:
        ids: ``[batch, width]``, padded with 0.
        mask: ``[batch, total]``, the cache's positions and these.
        positions: ``[batch, width]``.
        first: column of each row's first new token.
        counts: number of each row's new tokens.
        row: which row of the batch it is, when it is one alone.
    """

    ids: IntArray
    mask: IntArray
    positions: IntArray
    first: Sequence[int]
    counts: Sequence[int]
    row: int | None = None


class Decoding(ABC):
    """Sequences of one batch, with their cache. Made by :meth:`Decoder.start`.

    Attributes:
        decoder: where it runs.
        batch: number of rows.
        max_length: longest sequence allowed, in tokens.
        binding: the adapters of the rows; ``binding.states`` is the key of the cache.
        context: what else the graph reads, the same at every step: input name -> OrtValue.
        history: the token ids of each row that are in the cache.
    """

    def __init__(
        self,
        decoder: Decoder,
        batch: int,
        max_length: int,
        binding: Binding,
        context: Values,
    ) -> None:
        self.decoder = decoder
        self.context = context
        self.batch = batch
        self.max_length = max_length
        self.binding = binding
        self.history: list[list[int]] = [[] for _ in range(batch)]
        self._starts: IntArray | None = None
        self._gates_key: tuple[Any, ...] = ()
        self._gates: Values = {}  # what is bound; a binding does not keep its values alive
        self._io = self._bind_adapters(binding)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each row in the cache."""
        return [len(row) for row in self.history]

    def prefill(self, rows: Rows) -> FloatArray:
        """Run the prompts; the cache must be empty.

        Args:
            rows: token ids of each row, at least one each; lengths may differ.

        Returns:
            ``[batch, vocab] float32``, the logits after each row's last token.

        Raises:
            DataError: an empty row, an id outside the vocabulary, a row that is too long, or a
                cache that is not empty.
        """
        if any(self.history):
            raise DataError(
                "the cache is not empty", "Use extend() to go on, or start a new decoding."
            )
        return self.extend(rows)

    def extend(self, rows: Rows) -> FloatArray:
        """Append one or more tokens to every row; returns and raises as :meth:`prefill`."""
        return _last(self._checked(rows, every=False))

    def extend_all(self, rows: Rows) -> list[FloatArray]:
        """Append one or more tokens to every row.

        Returns:
            Per row ``[new tokens, vocab] float32``, the logits after each of them.
        """
        return self._checked(rows, every=True)

    def step(self, tokens: Sequence[int | None]) -> FloatArray:
        """Append one token to each row; a row whose token is None rests.

        Returns:
            ``[batch, vocab] float32``; the logits of a resting row mean nothing.

        Raises:
            DataError: as :meth:`prefill`, or all rows rest.
        """
        rows = [() if token is None else (token,) for token in tokens]
        if not any(rows) or not all(self.history):
            raise DataError("step() needs a prompt and a token", "Call prefill() first.")
        return _last(self._checked(rows, every=False, rest=True))

    def advance(self, tokens: Sequence[int | None]) -> FloatArray:
        """As :meth:`step`, but the logits are the next step's to overwrite: no copy is made."""
        return self.step(tokens)

    @abstractmethod
    def _feed(self, rows: Rows, every: bool) -> list[FloatArray]:
        """Run checked rows through the graph; an empty row rests."""

    def _check(self, rows: Rows, *, rest: bool = False) -> None:
        """Refuse what cannot be appended; the first rows decide where adapters are active."""
        if len(rows) != self.batch:
            raise DataError(
                f"{len(rows)} rows were given, the batch has {self.batch}", "Give one per row."
            )
        for index, (row, old) in enumerate(zip(rows, self.history, strict=True)):
            if not row and not rest:
                raise DataError(
                    f"row {index} has no tokens, expected at least 1", "Give a non-empty prompt."
                )
            if len(old) + len(row) > self.max_length:
                raise DataError(
                    f"row {index} would have {len(old) + len(row)} tokens, more than the "
                    f"{self.max_length} that this decoding was started for",
                    "Start it with a larger max_length.",
                )
        self.decoder.check_ids(rows)
        gates = self.binding.token_gates
        if gates is not None and self._starts is None:
            self._starts = gates.starts(rows)

    def _checked(self, rows: Rows, *, every: bool, rest: bool = False) -> list[FloatArray]:
        self._check(rows, rest=rest)
        logits = self._feed(rows, every)
        for old, row in zip(self.history, rows, strict=True):
            old.extend(row)
        return logits

    def _bind_adapters(self, binding: Binding) -> Feeds:
        """An IO binding with the adapters and the context bound; they stay bound for its life."""
        decoder = self.decoder
        spare = None if self.context else take_feeds(binding, decoder.session)
        if spare is not None:
            return spare
        values = {**binding.values, **self.context}
        own = {name: x for name, x in values.items() if name in decoder.inputs}  # not an encoder's
        return Feeds(decoder.session, own, in_place=decoder.pools)

    def _run(self, io: Feeds, chunk: Chunk, every: bool) -> list[FloatArray]:
        """Bind the chunk and the logits, run, and return each row's logits."""
        decoder = self.decoder
        batch, width = chunk.ids.shape
        last = [
            first + max(count, 1) - 1
            for first, count in zip(chunk.first, chunk.counts, strict=True)
        ]
        if every:
            picked = np.broadcast_to(np.arange(width, dtype=np.int64), (batch, width))
        else:
            picked = np.asarray(last, np.int64)[:, None]
        arrays = {
            "input_ids": chunk.ids,
            "attention_mask": chunk.mask,
            "position_ids": chunk.positions,
            NUM_LOGITS_TO_KEEP: np.array(0 if every else 1, np.int64),
            LOGITS_POSITIONS: picked,
        }
        for name, array in arrays.items():
            if name in decoder.inputs:
                io.feed(name, array)
        self._bind_gates(io, chunk, picked)
        kept = picked.shape[1] if decoder.keeps_last else width
        logits = io.output("logits", (batch, kept, decoder.part.vocab_size))
        io.run()
        if every:
            spans = [(f, f + n) for f, n in zip(chunk.first, chunk.counts, strict=True)]
        elif decoder.keeps_last:
            spans = [(0, 1)] * batch
        else:
            spans = [(column, column + 1) for column in last]
        return [logits[i, a:b] for i, (a, b) in enumerate(spans)]

    def _bind_gates(self, io: Feeds, chunk: Chunk, picked: IntArray) -> None:
        """Bind the gates that depend on the tokens of a chunk; the head sees those picked.

        From one step to the next they seldom change, and then they are bound already.
        """
        gates, starts = self.binding.token_gates, self._starts
        if gates is None or starts is None:
            return
        if chunk.row is not None:
            gates, starts = gates.row(chunk.row), starts[chunk.row : chunk.row + 1]
        active = gates.active(starts, chunk.positions)
        seen = np.take_along_axis(active, picked[:, :, None], 1)
        key = io, active.shape, active.tobytes(), seen.shape, seen.tobytes()
        if key == self._gates_key:
            return
        values = gates.values(active)
        if self.decoder.keeps_last:
            values |= gates.values(seen, lora_input(self.decoder.part.head, "gate"))
        for name, value in values.items():
            io.io.bind_ortvalue_input(name, value)
        self._gates_key, self._gates = key, values


class CachedDecoding(Decoding):
    """One that keeps keys and values, which can be read and written."""

    def resume(self, rows: Rows, kept: Sequence[Sequence[NDArray[Any]]]) -> FloatArray:
        """As :meth:`prefill`, of prompts whose first keys and values are known: runs the rest.

        Args:
            rows: the whole prompts.
            kept: of each row what :meth:`keys_and_values` gave for its first tokens under the same
                adapters, in order and without gaps, but not for all of its tokens.
        """
        if not any(kept):
            return self.prefill(rows)
        self._check(rows)
        counts = [sum(block.shape[2] for block in blocks) for blocks in kept]
        self._restore(kept)
        for old, row, count in zip(self.history, rows, counts, strict=True):
            old.extend(row[:count])
        return self.extend([row[count:] for row, count in zip(rows, counts, strict=True)])

    @abstractmethod
    def keys_and_values(self, row: int, spans: Sequence[tuple[int, int]]) -> Sequence[NDArray[Any]]:
        """Copies of what is in the cache for some of a row's tokens, on the CPU.

        Args:
            row: which.
            spans: of each piece its first token and the one behind its last.

        Returns:
            Of each piece ``[2 * layers, kv_heads, tokens, head_dim]``.
        """

    @abstractmethod
    def _restore(self, kept: Sequence[Sequence[NDArray[Any]]]) -> None:
        """Write the keys and values of each row's first tokens into the cache, which is empty."""


def _last(logits: Sequence[FloatArray]) -> FloatArray:
    """``[batch, vocab]``, the last of each row's; of one row without a copy."""
    return logits[0][-1:] if len(logits) == 1 else np.stack([row[-1] for row in logits])
