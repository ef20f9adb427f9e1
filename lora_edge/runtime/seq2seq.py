"""An encoder and a decoder in two ONNX Runtime sessions, without a cache.

Each step runs the decoder on the whole of what it has said so far. Knows tensors; knows nothing of
bundles, adapters' names or text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lora_edge.bundle.part import Part
from lora_edge.errors import DataError
from lora_edge.maths.lora import FloatArray
from lora_edge.runtime.adapters.binding import Binding
from lora_edge.runtime.rows import token_rows
from lora_edge.runtime.session import ModelSession

Sources = Sequence[Sequence[int]] | NDArray[np.float32]
"""Rows of token ids, special tokens included; or features ``[batch, mels, frames]``."""

_HIDDEN = "encoder_hidden_states"
_MASK = "encoder_attention_mask"


@dataclass(frozen=True)
class _Heard:
    """What the decoder is given of the encoder: input name -> OrtValue; the batch, its adapters."""

    values: Mapping[str, Any]
    batch: int
    binding: Binding


class Recomputed:
    """Sequences of a decoder that keeps nothing: each step runs it on the whole of every row.

    What else the decoder reads (the encoder's states) stays the same from step to step.

    Args:
        run: all rows -> the logits ``[len(row), vocab]`` of each.
    """

    def __init__(self, run: Callable[[Sequence[Sequence[int]]], list[FloatArray]]) -> None:
        self._run = run
        self._rows: list[list[int]] = []

    def prefill(self, rows: Sequence[Sequence[int]]) -> FloatArray:
        """As :class:`~lora_edge.runtime.generation.Steps` has it."""
        self._rows = [list(row) for row in rows]
        return self._last()

    def step(self, tokens: Sequence[int | None]) -> FloatArray:
        """As :class:`~lora_edge.runtime.generation.Steps` has it."""
        for row, token in zip(self._rows, tokens, strict=True):
            if token is not None:
                row.append(token)
        return self._last()

    def _last(self) -> FloatArray:
        return np.stack([logits[-1] for logits in self._run(self._rows)])


class Seq2Seq(ModelSession):
    """Two sessions, on an encoder's graph and a decoder's."""

    def __init__(self, folder: Path, parts: Mapping[str, Part], **options: Any) -> None:
        """As :class:`~lora_edge.runtime.session.ModelSession`, of an encoder and a decoder."""
        super().__init__(folder, parts, **options)
        self.encoder, self.decoder = parts["encoder"], parts["decoder"]

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
        heard = self._hear(sources, binding)
        rows = self._targets(targets, heard.batch)
        return self._say(heard, rows)

    def start(self, sources: Sources, binding: Binding | None = None) -> Recomputed:
        """A new batch of answers, with nothing said yet.

        Args:
            sources: as for :meth:`logits`.
            binding: the adapters of the rows; None is off on every row.

        Raises:
            DataError: as :meth:`logits`.
        """
        heard = self._hear(sources, binding)
        return Recomputed(lambda rows: self._say(heard, self._targets(rows, heard.batch)))

    def keys(self, sources: Sources) -> Sequence[Sequence[int]]:
        """Numbers that tell the inputs of a batch from each other."""
        if not self.encoder.sample:
            return [list(row) for row in sources]
        rows = (np.asarray(row, np.float32).tobytes() for row in sources)
        return [list(hashlib.blake2b(row, digest_size=16).digest()) for row in rows]

    def _hear(self, sources: Sources, binding: Binding | None) -> _Heard:
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
        given = {_HIDDEN: ort.OrtValue.ortvalue_from_numpy(hidden)}
        if _MASK in self.graphs["decoder"].inputs:
            given[_MASK] = values["attention_mask"]
        return _Heard(given, batch, adapters)

    def _say(self, heard: _Heard, rows: Sequence[Sequence[int]]) -> list[FloatArray]:
        # The decoder is causal: what pads a row on the right is seen by no token of it.
        ids = _right_padded(rows, self.decoder.pad_token_id)
        values = {**heard.values, "input_ids": ort.OrtValue.ortvalue_from_numpy(ids)}
        found = self.graphs["decoder"].run(values, heard.binding, self.decoder.output)
        return [logits[: len(row)] for row, logits in zip(rows, found, strict=True)]

    def _padded(self, sources: Sources) -> dict[str, NDArray[Any]]:
        rows, _, width = token_rows(sources, None)
        _check(rows, self.encoder, "the encoder")
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

    def _targets(self, targets: Sequence[Sequence[int]], batch: int) -> list[list[int]]:
        rows, _, _ = token_rows(targets, None)
        if len(rows) != batch:
            raise DataError(
                f"{len(rows)} rows were given to the decoder and {batch} to the encoder",
                "Give one for each.",
            )
        _check(rows, self.decoder, "the decoder")
        return rows


def _check(rows: Sequence[Sequence[int]], part: Part, who: str) -> None:
    length = max(map(len, rows))
    if part.max_length and length > part.max_length:
        raise DataError(
            f"a row has {length} tokens; {who} has {part.max_length} positions", "Shorten it."
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
