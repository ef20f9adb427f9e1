"""Hidden states of tokens -> one embedding for each text, as sentence-transformers does it.

Source: sentence-transformers 6, ``modules/pooling.py`` and ``modules/normalize.py``. Knows numpy
and nothing of files, sessions or texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lora_edge.maths.lora import FloatArray

Mode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
MODES: tuple[Mode, ...] = get_args(Mode)

_LEAST = 1e-9  # of a denominator
_SHORTEST = 1e-12  # of an embedding that is scaled to length 1


@dataclass(frozen=True)
class Pooling:
    """How the hidden states of a text become its embedding.

    Attributes:
        modes: one or several, whose results are put side by side: the first token (``cls``), the
            largest value of each feature (``max``), the ``mean`` over the tokens, their sum over
            the root of their number (``mean_sqrt_len_tokens``), the mean weighted by 1, 2, 3, …
            (``weightedmean``), or the last token.
        normalize: scale the embedding to length 1.
        include_prompt: the tokens of a prompt count like those of the text.
    """

    modes: tuple[Mode, ...] = ("mean",)
    normalize: bool = False
    include_prompt: bool = True

    def __call__(
        self, hidden: FloatArray, attention_mask: NDArray[np.int64], prompt_length: int = 0
    ) -> FloatArray:
        """``[batch, seq, hidden]`` and ``[batch, seq]`` -> ``[batch, modes * hidden] float32``.

        Args:
            hidden: float32.
            attention_mask: of 0 and 1; rows are padded on the right.
            prompt_length: tokens at the beginning of every row that are the prompt's.
        """
        mask = np.array(attention_mask)
        if not self.include_prompt:
            mask[:, :prompt_length] = 0
        pooled = np.concatenate([_pooled(mode, hidden, mask) for mode in self.modes], axis=1)
        if self.normalize:
            length = np.linalg.norm(pooled, axis=1, keepdims=True)
            pooled = pooled / np.maximum(length, _SHORTEST)
        found: FloatArray = pooled.astype(np.float32)
        return found


def _pooled(mode: Mode, hidden: FloatArray, mask: NDArray[np.int64]) -> NDArray[np.floating]:
    rows = np.arange(len(hidden))
    kept = mask[:, :, None].astype(np.float32)
    if mode == "cls":
        first: NDArray[np.floating] = hidden[rows, mask.argmax(1)]
        return first
    if mode == "lasttoken":
        last = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
        # Of a row without a token that counts nothing is left.
        found: NDArray[np.floating] = hidden[rows, last] * mask.max(1)[:, None]
        return found
    if mode == "max":
        largest: NDArray[np.floating] = np.where(kept > 0, hidden, -np.inf).max(1)
        return largest
    if mode == "weightedmean":
        kept = kept * np.arange(1, mask.shape[1] + 1, dtype=np.float32)[None, :, None]
    count = np.maximum(kept.sum(1), np.float32(_LEAST))
    if mode == "mean_sqrt_len_tokens":
        count = np.sqrt(count)
    mean: NDArray[np.floating] = (hidden * kept).sum(1) / count
    return mean
