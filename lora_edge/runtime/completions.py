"""Text generation: prompts to token ids, and a generation's steps to ids or pieces of text.

Knows the tokenizer and the loop; knows nothing of bundles or adapters' names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lora_edge.errors import DataError
from lora_edge.runtime.generation import Generation
from lora_edge.runtime.text import TextStream
from lora_edge.runtime.tokenizer import Message, Tokenizer

Prompt = str | Sequence[Message]
"""A text, or a conversation."""


def encode(prompts: Any, chat: bool, tokenizer: Callable[[], Tokenizer]) -> list[list[int]]:
    """The token ids of prompts, or of one that is not in a list.

    Args:
        prompts: texts; with ``chat`` also conversations.
        chat: put them through the tokenizer's chat template.
        tokenizer: gives the tokenizer; called when the prompts are texts.

    Raises:
        DataError: a prompt that is no text, or ``chat`` without a template.
    """
    conversation = chat and prompts and all(isinstance(m, Mapping) for m in prompts)
    if isinstance(prompts, str) or conversation:
        prompts = [prompts]
    if chat:
        return [tokenizer().encode_chat(prompt) for prompt in prompts]
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise DataError(
                f"a prompt is {type(prompt).__name__}, expected text",
                "Pass chat=True for messages, or use generate_ids() for token ids.",
            )
    return [tokenizer().encode(prompt) for prompt in prompts]


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
    decode: Callable[[Sequence[int]], str],
    stop: str | Sequence[str],
) -> Iterator[tuple[int, str]]:
    """(row, text) as it becomes certain; a row finishes before its first stop string."""
    stops = [stop] if isinstance(stop, str) else list(stop)
    texts = [TextStream(decode, stops) for _ in range(batch)]

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
