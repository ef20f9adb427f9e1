"""One decoder graph in one ONNX Runtime session.

Knows tensors and token ids; knows nothing of bundles, adapters' names or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora_edge.errors import BundleError, DataError
from lora_edge.manifest import GraphSpec
from lora_edge.names import LOGITS_POSITIONS, past_name, present_name
from lora_edge.runtime.binding import Binding
from lora_edge.runtime.caches import ConcatenatedCache, SharedCache
from lora_edge.runtime.decoding import Decoding
from lora_edge.runtime.session import ModelSession

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Decoder(ModelSession[GraphSpec]):
    """A session on a decoder graph, and the way its cache and padding are handled."""

    def _open(self, path: Path) -> None:
        layers = range(self.spec.layers)
        self.past_names = tuple(
            past_name(layer, part) for layer in layers for part in ("key", "value")
        )
        self.present_names = tuple(
            present_name(layer, part) for layer in layers for part in ("key", "value")
        )
        graph = self._graph(
            path,
            {"input_ids", "attention_mask", *self.past_names},
            {"logits", *self.present_names},
        )
        if self.spec.form == "fused" and not self.spec.shared_cache:
            raise BundleError(
                f"{path}: a fused graph must take a shared cache", "Export the bundle again."
            )
        self.session = graph.session
        self.inputs = frozenset(graph.inputs)
        self.cache_dtype = np.dtype(_DTYPES[graph.inputs[self.past_names[0]]])

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
            DataError: no rows, more positions than the model has, or a binding for another batch.
        """
        if batch < 1:
            raise DataError(f"the batch has {batch} rows, expected at least 1", "Give a prompt.")
        if not 1 <= max_length <= self.spec.max_length:
            raise DataError(
                f"{max_length} positions were asked for; the model has {self.spec.max_length}",
                "Shorten the prompt, or lower max_new_tokens.",
            )
        kind = SharedCache if self.spec.shared_cache else ConcatenatedCache
        return kind(self, batch, max_length, self._bound(binding, batch))

    def check_ids(self, rows: Sequence[Sequence[int]]) -> None:
        """Refuse ids outside the vocabulary.

        Raises:
            DataError: the id, its row and the size of the vocabulary.
        """
        for index, row in enumerate(rows):
            for token in row:
                if not 0 <= token < self.spec.vocab_size:
                    raise DataError(
                        f"token id {token} in row {index} is outside the vocabulary of "
                        f"{self.spec.vocab_size}",
                        "Encode the text with the bundle's own tokenizer.",
                    )
