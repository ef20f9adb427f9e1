"""The generation loop: prompts in, new tokens out, one step of all rows at a time.

Knows ids only; text and stop strings are :mod:`lora_edge.runtime.text.text`'s.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from lora_edge.errors import DataError
from lora_edge.runtime.adapters.binding import Binding
from lora_edge.runtime.decoder import Decoder
from lora_edge.runtime.sampling import Sampling


class Generation:
    """Iterates over steps; each gives one new token per row, None for the rows that have finished.

    A row finishes after a token of ``eos_ids`` (which is given), after ``max_new_tokens``, or when
    :meth:`finish` is called. The loop ends when all rows have.

    Args:
        decoder: the decoder.
        prompts: token ids of each row.
        binding: the adapters of the rows; None is off on every row.
        max_new_tokens: at most so many new tokens a row.
        eos_ids: tokens that end each row.
        sampling: how tokens are chosen.

    Raises:
        DataError: no prompt, an empty prompt, an id outside the vocabulary, or a prompt that leaves
            no room for ``max_new_tokens``.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        binding: Binding | None,
        *,
        max_new_tokens: int,
        eos_ids: Sequence[Collection[int]],
        sampling: Sampling,
    ) -> None:
        longest = max((len(prompt) for prompt in prompts), default=0)
        limit = decoder.spec.max_length
        if max_new_tokens < 1:
            raise DataError(
                f"max_new_tokens is {max_new_tokens}, expected at least 1",
                "For the logits of a prompt alone there is logits().",
            )
        if longest + max_new_tokens > limit:
            room = limit - longest
            raise DataError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's "
                f"{limit} positions",
                f"Pass max_new_tokens={room} or less." if room > 0 else "Shorten the prompt.",
            )
        self._prompts = prompts
        self._max_new_tokens = max_new_tokens
        self._eos_ids = eos_ids
        self._sampling = sampling
        self._finished = [False] * len(prompts)
        self._decoding = decoder.start(len(prompts), longest + max_new_tokens, binding)

    def finish(self, row: int) -> None:
        """End a row; its later tokens are None."""
        self._finished[row] = True

    def __iter__(self) -> Iterator[list[int | None]]:
        generators = self._sampling.generators(self._prompts)
        histories = [set(prompt) for prompt in self._prompts]
        logits = self._decoding.prefill(self._prompts)
        for count in range(1, self._max_new_tokens + 1):
            tokens = [
                None if done else self._sampling.choose(values, generator, history)
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
            logits = self._decoding.step(
                [
                    None if done else token
                    for done, token in zip(self._finished, tokens, strict=True)
                ]
            )
