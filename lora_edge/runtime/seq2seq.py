"""An encoder and a decoder in two ONNX Runtime sessions.

Knows tensors; knows nothing of bundles, adapters' names or text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lora_edge.bundle.part import Part
from lora_edge.errors import DataError
from lora_edge.maths.lora import FloatArray
from lora_edge.names import ENCODER_MASK, ENCODER_STATES
from lora_edge.runtime.adapters.binding import Binding
from lora_edge.runtime.decoder import Decoder
from lora_edge.runtime.decoding import Decoding
from lora_edge.runtime.rows import token_rows

Sources = Sequence[Sequence[int]] | NDArray[np.float32]
"""Rows of token ids, special tokens included; or features ``[batch, mels, frames]``."""


class Seq2Seq(Decoder):
    """A decoder that reads an encoder's states besides what it has said."""

    def __init__(self, folder: Path, parts: Mapping[str, Part], **options: Any) -> None:
        """As :class:`~lora_edge.runtime.session.ModelSession`, of an encoder and a decoder."""
        super().__init__(folder, parts, **options)
        self.encoder = parts["encoder"]

    def logits(
        self,
        sources: Sources,
        targets: Sequence[Sequence[int]],
        binding: Binding | None = None,
    ) -> list[FloatArray]:
        """The decoder's logits after every one of its tokens, teacher-forced, in one batch.

        Args:
            sources: a row or features for each of the batch.
            targets: the decoder's tokens of each row, its start token first; of unequal lengths.
            binding: the adapters of the rows; None is off on every row.

        Returns:
            ``[len(target), vocab] float32`` for each row.

        Raises:
            DataError: sources or targets that are empty, too long, outside the vocabulary or of
                another shape; or a binding for another batch.
        """
        decoding = self.answer(sources, binding)
        rows, _, _ = token_rows(targets, None)
        if len(rows) != decoding.batch:
            raise DataError(
                f"{len(rows)} rows were given to the decoder and {decoding.batch} to the encoder",
                "Give one for each.",
            )
        return decoding.extend_all(rows)

    def answer(self, sources: Sources, binding: Binding | None = None) -> Decoding:
        """A new batch of answers, with nothing said yet.

        Args:
            sources: as for :meth:`logits`.
            binding: the adapters of the rows; None is off on every row.

        Raises:
            DataError: as :meth:`logits`.
        """
        if self.encoder.sample:
            feeds = {"input_features": self._features(sources)}
        else:
            feeds = self._padded(sources)
        batch = len(next(iter(feeds.values())))
        adapters = self._bound(binding, batch)
        if adapters.token_gates is not None:
            raise DataError(
                "an activated LoRA does not work in an encoder-decoder", "Use another adapter."
            )
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        hidden = self.graphs["encoder"].run(values, adapters, self.encoder.output)
        context = {ENCODER_STATES: ort.OrtValue.ortvalue_from_numpy(hidden)}
        if ENCODER_MASK in self.inputs:
            context[ENCODER_MASK] = values["attention_mask"]
        return self.start(batch, self.longest, adapters, context)

    def keys(self, sources: Sources) -> Sequence[Sequence[int]]:
        """Numbers that tell the inputs of a batch from each other."""
        if not self.encoder.sample:
            return [list(row) for row in sources]
        rows = (np.asarray(row, np.float32).tobytes() for row in sources)
        return [list(hashlib.blake2b(row, digest_size=16).digest()) for row in rows]

    def _padded(self, sources: Sources) -> dict[str, NDArray[Any]]:
        rows, _, width = token_rows(sources, None)
        _check(rows, self.encoder)
        mask = np.zeros((len(rows), width), np.int64)
        for index, row in enumerate(rows):
            mask[index, : len(row)] = 1
        ids = _right_padded(rows, self.encoder.pad_token_id)
        return {"input_ids": ids, "attention_mask": mask}

    def _features(self, sources: Sources) -> NDArray[np.float32]:
        array = np.asarray(sources)
        if array.shape[1:] != self.encoder.sample or not len(array) or array.dtype != np.float32:
            sizes = ", ".join(map(str, self.encoder.sample))
            raise DataError(
                f"input_features is {list(array.shape)} {array.dtype}, expected [batch, {sizes}] "
                "float32",
                "Prepare the speech by the bundle's own preprocessor_config.json.",
            )
        return np.ascontiguousarray(array)


def _check(rows: Sequence[Sequence[int]], part: Part) -> None:
    length = max(map(len, rows))
    if part.max_length and length > part.max_length:
        raise DataError(
            f"a row has {length} tokens; the encoder has {part.max_length} positions", "Shorten it."
        )
    outside = [x for row in rows for x in row if not 0 <= x < part.vocab_size]
    if outside:
        raise DataError(
            f"token id {outside[0]} is outside the vocabulary of {part.vocab_size}",
            "Encode the text with the bundle's own tokenizer.",
        )


def _right_padded(rows: Sequence[Sequence[int]], fill: int) -> NDArray[np.int64]:
    """``[batch, longest]``."""
    ids = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
    return ids
