"""Keys and values of earlier prompts, for later ones that begin alike.

A prompt is cut into blocks of :data:`BLOCK` tokens. What is in a block follows from the tokens up
to its end and from the adapters that were active on each of them, and by these it is found again: a
token before an adapter's invocation is the base's. Prompts that begin alike share their blocks.

What would give other last bits, which int8 activations make large, is not reused. ONNX Runtime's
CPU provider computes one token alone by other kernels than several: what decode steps have made is
not kept, and two tokens at least of each prompt are run. An adapter beside others is added up in
another order than alone. So is one in the weights: a pinned session has blocks of its own. The
other graphs of a bundle give the same bits, and share them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_edge.maths.lora import FloatArray
from lora_edge.runtime.adapters.binding import State, invoked_at
from lora_edge.runtime.decoding import CachedDecoding
from lora_edge.runtime.resident import Key, SizedCache

if TYPE_CHECKING:
    from lora_edge.runtime.decoding import Decoding, Rows
    from lora_edge.runtime.generation import Steps

BLOCK = 16
"""Tokens that are kept and found together."""

_RUN = 2  # tokens of a prompt, at least
_ANY_GRAPH = -1  # no session's serial


class Prefixes:
    """The last used blocks, up to a number of bytes.

    Args:
        limit: bytes that are kept at most; 0 keeps nothing.
        invocations: of each adapter the token ids that activate it; empty: active everywhere.
        generation: a number that changes when an adapter's tensors do.
    """

    def __init__(
        self,
        limit: int,
        invocations: Mapping[str, Sequence[int]],
        generation: Callable[[], int],
    ) -> None:
        self.limit = limit
        self.invocations = invocations
        self.generation = generation
        self.blocks = SizedCache(limit)

    @property
    def bytes(self) -> int:
        """Bytes of what is kept."""
        return self.blocks.size

    def forget(self) -> None:
        """Keep nothing of what is here."""
        self.blocks.clear(lambda _: True)

    def reused(self, decoding: Decoding, generation: int) -> Steps:
        """A decoding that runs the rest of its prompts only, and leaves their blocks here.

        Args:
            decoding: new.
            generation: when its binding was asked for.

        Returns:
            The decoding itself where nothing can be kept: it has no cache, or one in a device's
            memory; or it reads a context, which its keys and values follow from, too.
        """
        decoder = decoding.decoder
        if not isinstance(decoding, CachedDecoding) or not decoder.pools or decoding.context:
            return decoding
        one = decoder.kept
        size = 2 * one.layers * one.kv_heads * one.head_dim * decoder.cache_dtype.itemsize * BLOCK
        fitting = self.limit // size
        return _Reused(self, decoding, generation, fitting) if fitting else decoding


class _Reused:
    """Steps of a decoding whose prompts may begin like earlier ones.

    Args:
        prefixes: where blocks are kept.
        decoding: new.
        generation: when its binding was asked for.
        fitting: blocks of one row that fit.
    """

    def __init__(
        self, prefixes: Prefixes, decoding: CachedDecoding, generation: int, fitting: int
    ) -> None:
        self._prefixes = prefixes
        self._decoding = decoding
        self._generation = generation
        self._fitting = fitting
        decoder = decoding.decoder
        self._graph = _ANY_GRAPH if decoder.fixed is None else decoder.serial

    def prefill(self, rows: Rows) -> FloatArray:
        """As :meth:`~lora_edge.runtime.decoding.Decoding.prefill`."""
        decoding = self._decoding
        if len(rows) != decoding.batch or not self._current:
            return decoding.prefill(rows)
        decoding.decoder.check_ids(rows)
        states = decoding.binding.states
        states = states * len(rows) if len(states) == 1 else states
        invocations, beside = self._prefixes.invocations, company(states, decoding.decoder.by_row)
        keys = [
            [(self._generation, self._graph, digest) for digest in found[: self._fitting]]
            for found in (
                digests(row, state, invocations, beside)
                for row, state in zip(rows, states, strict=True)
            )
        ]
        logits = decoding.resume(
            rows, [self._found(own, row) for own, row in zip(keys, rows, strict=True)]
        )
        if self._current:
            for row, own in enumerate(keys):
                self._keep(row, own)
        return logits

    def advance(self, tokens: Sequence[int | None]) -> FloatArray:
        """As :meth:`~lora_edge.runtime.decoding.Decoding.advance`."""
        return self._decoding.advance(tokens)

    @property
    def _current(self) -> bool:
        """Whether its adapters' tensors are still those of their names."""
        return self._prefixes.generation() == self._generation

    def _found(self, keys: Sequence[Key], row: Sequence[int]) -> list[Any]:
        """The blocks that a prompt begins with."""
        found: list[Any] = []
        for key in keys[: max(len(row) - _RUN, 0) // BLOCK]:
            block = self._prefixes.blocks.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def _keep(self, row: int, keys: Sequence[Key]) -> None:
        """Keep the blocks of a row that are not here.

        The first ones are used last: without them those behind them are not found.
        """
        blocks = self._prefixes.blocks
        missing = [index for index, key in enumerate(keys) if blocks.get(key) is None]
        spans = [(index * BLOCK, (index + 1) * BLOCK) for index in missing]
        made = dict(zip(missing, self._decoding.keys_and_values(row, spans), strict=True))
        for index in reversed(range(len(keys))):
            block = made.get(index)
            if block is None:
                blocks.get(keys[index])
            else:
                blocks.keep(keys[index], block, block.nbytes)


def company(states: Sequence[State], by_row: bool) -> Sequence[Any]:
    """What the sums of a row's adapters depend on, beside the row: what lies beside them.

    Args:
        states: of all rows.
        by_row: each row has its own pairs, as long as the longest; else they are side by side.
    """
    if by_row:
        return sorted(set(states))
    names = sorted({name for state in states for name, _ in state})
    return names if len(set(states)) > 1 and len(names) > 1 else ()


def digests(
    row: Sequence[int],
    state: State,
    invocations: Mapping[str, Sequence[int]],
    beside: Sequence[Any] = (),
) -> list[bytes]:
    """What the whole blocks of a prompt are found by: each follows from those before it.

    Args:
        row: its tokens.
        state: its adapters and weights.
        invocations: of each adapter the token ids that activate it.
        beside: of :func:`company`; where no adapter is active it changes nothing.
    """
    import hashlib  # takes milliseconds, which importing the runtime has no need of

    starts = [(name, weight, invoked_at(row, invocations[name])) for name, weight in state]
    found: list[bytes] = []
    before = b""
    for first in range(0, len(row) - BLOCK + 1, BLOCK):
        active = [  # and from which of the block's tokens on
            (name, weight, max(start - first, 0))
            for name, weight, start in starts
            if start < first + BLOCK
        ]
        tokens = np.asarray(row[first : first + BLOCK], np.int64).tobytes()
        told = before + tokens + repr((active, beside) if active else ()).encode()
        before = hashlib.blake2b(told, digest_size=32).digest()
        found.append(before)
    return found
