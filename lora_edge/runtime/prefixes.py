"""Keys and values of the beginnings of earlier rows, for later prompts that begin alike.

A row is cut into blocks of :data:`BLOCK` tokens. What is in a block follows from the tokens up to
its end and from the adapters that were active on each of them, and by these it is found again: a
token before an adapter's invocation is the base's. Rows that begin alike share their blocks.

The graphs of a bundle share blocks: they give the same numbers but for the order of sums. A pinned
session has its own.
"""

from __future__ import annotations

import hashlib
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
        """A decoding that runs the rest of its prompts only, and leaves its rows' blocks here.

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
        fitting = self.limit // size if size else 0
        return _Reused(self, decoding, generation, fitting) if fitting else decoding


class _Reused:
    """Steps of a decoding, and the blocks of its rows.

    Args:
        prefixes: where they are kept.
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
        self._chains: list[_Chain] = []

    @property
    def _current(self) -> bool:
        """Whether its adapters are still those that have their names."""
        return self._prefixes.generation() == self._generation

    def prefill(self, rows: Rows) -> FloatArray:
        """As :meth:`~lora_edge.runtime.decoding.Decoding.prefill`."""
        decoding = self._decoding
        decoding.decoder.check_ids(rows)
        states = decoding.binding.states
        if len(states) == 1:
            states = states * len(rows)
        if len(states) == len(rows):  # else it is refused
            self._chains = [
                _Chain(state, self._prefixes.invocations, row)
                for state, row in zip(states, rows, strict=True)
            ]
        found = [self._found(chain, row) for chain, row in zip(self._chains, rows, strict=False)]
        logits = decoding.resume(rows, found)
        for row in range(len(rows)):
            self._keep(row)
        return logits

    def advance(self, tokens: Sequence[int | None]) -> FloatArray:
        """As :meth:`~lora_edge.runtime.decoding.Decoding.advance`."""
        logits = self._decoding.advance(tokens)
        for row, token in enumerate(tokens):
            if token is not None and len(self._decoding.history[row]) % BLOCK == 0:
                self._keep(row)
        return logits

    def _found(self, chain: _Chain, row: Sequence[int]) -> list[Any]:
        """The blocks that a prompt begins with; a token at least is left to be run."""
        found: list[Any] = []
        if not self._current:
            return found
        for digest in chain.grown(row, max(len(row) - 1, 0) // BLOCK):
            block = self._prefixes.blocks.get(self._key(digest))
            if block is None:
                break
            found.append(block)
        return found

    def _keep(self, row: int) -> None:
        """Keep the blocks of a row that are not here.

        The first ones are used last: without them those behind them are not found.
        """
        if not self._current:
            return
        history, blocks = self._decoding.history[row], self._prefixes.blocks
        count = min(len(history) // BLOCK, self._fitting)
        keys = [self._key(digest) for digest in self._chains[row].grown(history, count)]
        missing = [index for index, key in enumerate(keys) if blocks.get(key) is None]
        spans = [(index * BLOCK, (index + 1) * BLOCK) for index in missing]
        made = dict(zip(missing, self._decoding.keys_and_values(row, spans), strict=True))
        for index in reversed(range(count)):
            block = made.get(index)
            if block is None:
                blocks.get(keys[index])
            else:
                blocks.keep(keys[index], block, block.nbytes)

    def _key(self, digest: bytes) -> Key:
        return self._generation, self._graph, digest


class _Chain:
    """What the blocks of a row are found by: each follows from those before it.

    Args:
        state: the row's adapters and weights.
        invocations: of each adapter the token ids that activate it.
        prompt: decides where they are active from.
    """

    def __init__(
        self, state: State, invocations: Mapping[str, Sequence[int]], prompt: Sequence[int]
    ) -> None:
        self._starts = [
            (name, weight, invoked_at(prompt, invocations[name])) for name, weight in state
        ]
        self._digests: list[bytes] = []

    def grown(self, row: Sequence[int], count: int) -> Sequence[bytes]:
        """The first so many blocks of a row, which only grows."""
        for first in range(len(self._digests) * BLOCK, count * BLOCK, BLOCK):
            offsets = [
                (name, weight, max(start - first, 0)) for name, weight, start in self._starts
            ]
            active = [each for each in offsets if each[2] < BLOCK]  # from which of its tokens on
            before = self._digests[-1] if self._digests else b""
            tokens = np.asarray(row[first : first + BLOCK], np.int64).tobytes()
            self._digests.append(
                hashlib.blake2b(before + tokens + repr(active).encode(), digest_size=32).digest()
            )
        return self._digests[:count]
