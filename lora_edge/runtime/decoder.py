"""One decoder graph in one ONNX Runtime session.

Knows tensors and token ids; knows nothing of bundles, adapters' names or text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_edge.bundle.part import Part
from lora_edge.errors import BundleError, DataError
from lora_edge.names import LOGITS_POSITIONS, SELECT, parse_lora_input
from lora_edge.runtime.adapters.binding import Binding
from lora_edge.runtime.caches import ConcatenatedCache, SharedCache
from lora_edge.runtime.decoding import Decoding
from lora_edge.runtime.session import ModelSession, past_names, present_names

_FED = ("input_ids", "attention_mask", "position_ids", LOGITS_POSITIONS)
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Decoder(ModelSession):
    """A session on a decoder graph, and the way its cache and padding are handled."""

    def __init__(self, folder: Path, parts: Mapping[str, Part], **options: Any) -> None:
        """As :class:`~lora_edge.runtime.session.ModelSession`, of one part with a cache."""
        super().__init__(folder, parts, **options)
        self.part = parts["decoder"]
        path = folder / self.part.file
        if self.part.cache is None:
            raise BundleError(f"{path}: a decoder needs a cache", "Export the bundle again.")
        self.cache = self.part.cache
        self.past_names = past_names(self.cache)
        self.present_names = present_names(self.cache)
        if self.part.form == "fused" and self.cache.kind != "shared":
            raise BundleError(
                f"{path}: a fused graph must take a shared cache", "Export the bundle again."
            )
        inputs = self.graphs["decoder"].inputs
        fed = {*_FED, *self.past_names}
        odd = [x for x in inputs if x not in fed and x != SELECT and not parse_lora_input(x)]
        if odd:
            raise BundleError(
                f"{path} has the input {odd[0]}, which a decoder of {self.cache.layers} layers has "
                "no value for",
                "Export the bundle again.",
            )
        self.inputs = frozenset(inputs)
        kind = inputs[self.past_names[0]]
        if kind not in _DTYPES:
            raise BundleError(
                f"{path}: {self.past_names[0]} is a {kind}, expected {' or '.join(_DTYPES)}",
                "Export the bundle again.",
            )
        self.cache_dtype = np.dtype(_DTYPES[kind])

    @property
    def picks_positions(self) -> bool:
        """The graph computes the logits of chosen positions only."""
        return LOGITS_POSITIONS in self.inputs

    def start(self, batch: int, max_length: int, binding: Binding | None = None) -> Decoding:
        """A new batch of sequences with an empty cache.

        Args:
            batch: number of rows.
            max_length: longest sequence, prompt and new tokens together; the shared cache is
                allocated for it.
            binding: the adapters of the rows; None is off on every row.

        Raises:
            DataError: no rows, more positions than the model has or the memory holds, or a binding
                for another batch.
        """
        if batch < 1:
            raise DataError(f"the batch has {batch} rows, expected at least 1", "Give a prompt.")
        if not 1 <= max_length <= self.part.max_length:
            raise DataError(
                f"{max_length} positions were asked for; the model has {self.part.max_length}",
                "Shorten the prompt, or lower max_new_tokens.",
            )
        kind = SharedCache if self.cache.kind == "shared" else ConcatenatedCache
        try:
            return kind(self, batch, max_length, self._bound(binding, batch))
        except MemoryError as error:
            raise DataError(
                f"a cache of {max_length} positions for {batch} rows does not fit in the memory",
                "Lower max_new_tokens, or run fewer rows at once.",
            ) from error

    def check_ids(self, rows: Sequence[Sequence[int]]) -> None:
        """Refuse ids outside the vocabulary.

        Raises:
            DataError: the id, its row and the size of the vocabulary.
        """
        for index, row in enumerate(rows):
            for token in row:
                if not 0 <= token < self.part.vocab_size:
                    raise DataError(
                        f"token id {token} in row {index} is outside the vocabulary of "
                        f"{self.part.vocab_size}",
                        "Encode the text with the bundle's own tokenizer.",
                    )
