"""Prompts in the shape of a bundle's chat template."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_edge.errors import LoraEdgeError
from lora_edge.parity.plan.states import Row
from lora_edge.runtime import Runner

_TEXT = """
the of and to in that is was for it with as on be at by this had not are but from or have an they
which one you were all her she there would their we him been has when who will no more if out so
River 1984 naïve Straße 東京 данные 🙂 x=y+1; https://example.org (a) "quoted" don't 3.14 and/or
UPPER snake_case * [link] {braces} é ½ … 50% €20 What? Why! Hmm,
"""
"""What conversations are made of: common words, and what tokenizers find hard."""


def chat_row(runner: Runner, length: int, seed: int) -> Row | None:
    """A conversation as the bundle's chat template writes it, of at most so many tokens.

    Args:
        runner: of a bundle that generates text.
        length: of the row; as near to it as whole words come.
        seed: of the words.

    Returns:
        ``None`` where the bundle has no template, or one that takes no conversation so short.
    """
    vocabulary = _TEXT.split()
    words = [
        vocabulary[i] for i in np.random.default_rng(seed).integers(0, len(vocabulary), length)
    ]
    for opening in (({"role": "system", "content": "Answer in one sentence."},), ()):
        try:
            least, most = 1, length
            best: Row | None = None
            while least <= most:
                count = (least + most) // 2
                row = tuple(runner.tokenizer.encode_chat([*opening, *_turns(words[:count])]))
                if len(row) <= length:
                    best, least = row, count + 1
                else:
                    most = count - 1
        except LoraEdgeError:  # no tokenizer, no template, or one that takes no system prompt
            continue
        if best and max(best) < runner.part.vocab_size:
            return best
    return None


def _turns(words: Sequence[str]) -> list[dict[str, str]]:
    """A question, an answer and a longer question."""
    third = max(1, len(words) // 3)
    parts = (("user", words[:third]), ("assistant", words[third : third + 8]), ("user", words))
    return [{"role": role, "content": " ".join(said) or "Yes."} for role, said in parts]
