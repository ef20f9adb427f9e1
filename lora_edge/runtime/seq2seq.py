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

from lora_edge.bundle.bundle import DECODER_FILE, ENCODER_FILE
from lora_edge.bundle.manifest import Seq2SeqSpec
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


class Seq2Seq(ModelSession[Seq2SeqSpec]):
    """Two sessions, on an encoder's graph and a decoder's.

    Its ``path`` is the folder of ``encoder_model.onnx`` and ``decoder_model.onnx``.
    """

    def _open(self, path: Path) -> None:
        below = f"{self.spec.encoder}."
        heard = {name: site for name, site in self.sites.items() if name.startswith(below)}
        said = {name: site for name, site in self.sites.items() if name not in heard}
        needed = set(self.spec.inputs), {"input_ids", _HIDDEN}
        self._encoder = self._graph(path / Path(ENCODER_FILE).name, needed[0], set(), heard)
        self._decoder = self._graph(path / Path(DECODER_FILE).name, needed[1], set(), said)

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

    def starts(self, batch: int, start: Sequence[int] | None = None) -> list[Sequence[int]]:
        """What the decoder of each row begins with.

        Args:
            batch: number of rows.
            start: the tokens; None: those that the checkpoint says.

        Raises:
            DataError: the checkpoint leaves it open.
        """
        if start is None and self.spec.open_language:
            raise DataError(
                "the checkpoint leaves the language of the speech open",
                "Give start=[...]: the tokens <|startoftranscript|>, the language's, the task's "
                "and <|notimestamps|>.",
            )
        return [self.spec.start if start is None else start] * batch

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
        if not self.spec.features:
            return [list(row) for row in sources]
        rows = (np.asarray(row, np.float32).tobytes() for row in sources)
        return [list(hashlib.blake2b(row, digest_size=16).digest()) for row in rows]

    def _hear(self, sources: Sources, binding: Binding | None) -> _Heard:
        if self.spec.features:
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
        hidden = self._encoder.run(values, adapters, self._encoder.outputs[0])
        given = {_HIDDEN: ort.OrtValue.ortvalue_from_numpy(hidden)}
        if _MASK in self._decoder.inputs:
            given[_MASK] = values["attention_mask"]
        return _Heard(given, batch, adapters)

    def _say(self, heard: _Heard, rows: Sequence[Sequence[int]]) -> list[FloatArray]:
        # The decoder is causal: what pads a row on the right is seen by no token of it.
        ids = _right_padded(rows, self.spec.pad_token_id)
        values = {**heard.values, "input_ids": ort.OrtValue.ortvalue_from_numpy(ids)}
        found = self._decoder.run(values, heard.binding, self._decoder.outputs[0])
        return [logits[: len(row)] for row, logits in zip(rows, found, strict=True)]

    def _padded(self, sources: Sources) -> dict[str, NDArray[Any]]:
        rows, _, width = token_rows(sources, None)
        self._check(rows, self.spec.max_source, "the encoder")
        mask = np.zeros((len(rows), width), np.int64)
        for index, row in enumerate(rows):
            mask[index, : len(row)] = 1
        ids = _right_padded(rows, self.spec.pad_token_id)
        return {"input_ids": ids, "attention_mask": mask}

    def _features(self, sources: Sources) -> NDArray[np.float32]:
        array = np.asarray(sources)
        if array.shape[1:] != self.spec.features or not len(array) or array.dtype != np.float32:
            sizes = ", ".join(map(str, self.spec.features))
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
        self._check(rows, self.spec.max_target, "the decoder")
        return rows

    def _check(self, rows: Sequence[Sequence[int]], longest: int, who: str) -> None:
        length = max(map(len, rows))
        if longest and length > longest:
            raise DataError(
                f"a row has {length} tokens; {who} has {longest} positions", "Shorten it."
            )
        outside = [x for row in rows for x in row if not 0 <= x < self.spec.vocab_size]
        if outside:
            raise DataError(
                f"token id {outside[0]} is outside the vocabulary of {self.spec.vocab_size}",
                "Encode the text with the bundle's own tokenizer.",
            )


def _right_padded(rows: Sequence[Sequence[int]], fill: int) -> NDArray[np.int64]:
    """``[batch, longest]``."""
    ids = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
    return ids
