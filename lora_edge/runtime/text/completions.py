"""Text generation: prompts to token ids, and a generation's steps to ids or pieces of text.

Knows the tokenizer and the loop; knows nothing of bundles or adapters' names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lora_edge.errors import DataError
from lora_edge.runtime.generation import Generation
from lora_edge.runtime.text.text import Message, TextStream
from lora_edge.runtime.text.tokenizer import Tokenizer
from lora_edge.types import listed

Prompt = str | Sequence[Message]
"""A text, or a conversation."""


def as_list(prompts: Any, chat: bool) -> list[Any]:
    """The prompts of a batch; one that is not in a list becomes a list of one.

    Raises:
        DataError: a prompt that is neither text nor, with ``chat``, a conversation.
    """
    conversation = False
    if chat and isinstance(prompts, Sequence) and len(prompts):
        conversation = all(isinstance(message, Mapping) for message in prompts)
    if isinstance(prompts, str) or conversation:
        return [prompts]
    listed("prompts", prompts)
    for prompt in prompts:
        if not chat and not isinstance(prompt, str):
            raise DataError(
                f"a prompt is {type(prompt).__name__}, expected text",
                "Pass chat=True for messages, or use generate_ids() for token ids.",
            )
    return list(prompts)


def encode(
    prompts: Sequence[Any], tokenizers: Sequence[Tokenizer], chat: bool, **context: Any
) -> list[list[int]]:
    """The token ids of prompts.

    Args:
        prompts: texts; with ``chat`` also conversations.
        tokenizers: of each prompt.
        chat: put them through the tokenizer's chat template.
        context: ``tools`` and ``documents`` for the template.

    Raises:
        DataError: a text that is none, or ``chat`` without a template that takes the messages.
    """
    together = zip(tokenizers, prompts, strict=True)
    if chat:
        return [tokenizer.encode_chat(prompt, **context) for tokenizer, prompt in together]
    return [tokenizer.encode(prompt) for tokenizer, prompt in together]


def new_ids(generation: Generation, batch: int) -> list[list[int]]:
    """Each row's new token ids, its end token included."""
    found: list[list[int]] = [[] for _ in range(batch)]
    for tokens in generation:
        for row, token in enumerate(tokens):
            if token is not None:
                found[row].append(token)
    return found


def pieces(
    generation: Generation,
    batch: int,
    decode: Sequence[Callable[[Sequence[int]], str]],
    stop: str | Sequence[str],
) -> Iterator[tuple[int, str]]:
    """(row, text) as it becomes certain; a row finishes before its first stop string.

    Args:
        generation: the loop.
        batch: number of rows.
        decode: of each row: token ids -> text.
        stop: the stop strings.
    """
    stops = [stop] if isinstance(stop, str) else list(stop)
    texts = [TextStream(decode[row], stops) for row in range(batch)]

    def run() -> Iterator[tuple[int, str]]:
        for tokens in generation:
            for row, token in enumerate(tokens):
                if token is not None:
                    yield row, texts[row].push(token)
                    if texts[row].stopped:
                        generation.finish(row)
        for row, text in enumerate(texts):
            yield row, text.close()

    return run()
