"""The generation loop: prompts in, new tokens out, one step of all rows at a time.

Knows ids only; text and stop strings are :mod:`lora_edge.runtime.text.text`'s.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import numpy as np

from lora_edge.bundle.part import Beginning
from lora_edge.errors import DataError
from lora_edge.maths.lora import FloatArray
from lora_edge.runtime.sampling import Sampling


class Steps(Protocol):
    """Sequences of one batch that grow by a token at a time, with a cache or without."""

    def prefill(self, rows: Sequence[Sequence[int]]) -> FloatArray:
        """The first tokens of each row; returns the logits ``[batch, vocab]`` after the last."""

    def advance(self, tokens: Sequence[int | None]) -> FloatArray:
        """One more token of each row, ``None`` for one that rests; returns as :meth:`prefill`,
        but what it returned before is gone."""


def check_room(longest: int, max_new_tokens: int, limit: int, whose: str = "the model") -> None:
    """Check that a model has positions for what is to be generated.

    Args:
        longest: tokens of the longest row.
        max_new_tokens: at most so many new ones.
        limit: positions of the model, or of its graph; 0: any number.
        whose: what has the limit.

    Raises:
        DataError: it has not.
    """
    if max_new_tokens < 1:
        raise DataError(
            f"max_new_tokens is {max_new_tokens}, expected at least 1",
            "For the logits of a prompt alone there is logits().",
        )
    if limit and longest + max_new_tokens > limit:
        room = limit - longest
        raise DataError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the "
            f"{limit} positions of {whose}",
            f"Pass max_new_tokens={room} or less." if room > 0 else "Shorten the prompt.",
        )


class Generation:
    """Iterates over steps; each gives one new token per row, None for the rows that have finished.

    A row finishes after a token of ``eos_ids`` (which is given), after ``max_new_tokens``, or when
    :meth:`finish` is called. The loop ends when all rows have.

    Args:
        decoding: where the rows grow; new.
        prompts: token ids that each row begins with.
        max_new_tokens: at most so many new tokens a row.
        eos_ids: tokens that end each row.
        sampling: how tokens are chosen.
        keys: numbers that a row's samples follow from beside the seed; ``None``: its prompt.
        suppress: tokens that are never chosen.
        begin_suppress: tokens that are not chosen first.
    """

    def __init__(
        self,
        decoding: Steps,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos_ids: Sequence[Collection[int]],
        sampling: Sampling,
        keys: Sequence[Sequence[int]] | None = None,
        suppress: Sequence[int] = (),
        begin_suppress: Sequence[int] = (),
    ) -> None:
        self._prompts = prompts
        self._max_new_tokens = max_new_tokens
        self._eos_ids = eos_ids
        self._sampling = sampling
        self._finished = [False] * len(prompts)
        self._decoding = decoding
        self._keys = prompts if keys is None else keys
        self._suppress, self._first = list(suppress), [*suppress, *begin_suppress]

    def finish(self, row: int) -> None:
        """End a row; its later tokens are None."""
        self._finished[row] = True

    def __iter__(self) -> Iterator[list[int | None]]:
        generators = self._sampling.generators(self._keys)
        histories = [set(prompt) for prompt in self._prompts]
        logits = self._decoding.prefill(self._prompts)
        for count in range(1, self._max_new_tokens + 1):
            barred = self._first if count == 1 else self._suppress
            tokens = [
                None
                if done
                else self._sampling.choose(_without(values, barred), generator, history)
                for done, values, generator, history in zip(
                    self._finished, logits, generators, histories, strict=True
                )
            ]
            for row, token in enumerate(tokens):
                if token is not None:
                    histories[row].add(token)
                if token in self._eos_ids[row]:
                    self.finish(row)
            yield tokens
            if all(self._finished) or count == self._max_new_tokens:
                return
            logits = self._decoding.advance(
                [
                    None if done else token
                    for done, token in zip(self._finished, tokens, strict=True)
                ]
            )


def _without(logits: FloatArray, barred: Sequence[int]) -> FloatArray:
    """Logits of which these tokens are never chosen."""
    if barred:
        logits = logits.copy()
        logits[barred] = -np.inf
    return logits


def begin(beginning: Beginning, start: Sequence[int] | None = None) -> Sequence[int]:
    """What the decoder of an encoder-decoder begins with.

    Args:
        beginning: what the checkpoint says.
        start: other tokens; None: those that the checkpoint says.

    Raises:
        DataError: the checkpoint leaves it open.
    """
    if start is None and beginning.open_language:
        raise DataError(
            "the checkpoint leaves the language of the speech open",
            "Give start=[...]: the tokens <|startoftranscript|>, the language's, the task's "
            "and <|notimestamps|>.",
        )
    return beginning.start if start is None else start
