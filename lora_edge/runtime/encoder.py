"""One graph without a cache in one ONNX Runtime session: logits or hidden states of a batch.

Knows tensors; knows nothing of bundles, adapters' names, text or images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lora_edge.bundle.part import Part
from lora_edge.errors import DataError
from lora_edge.runtime.adapters.binding import Binding
from lora_edge.runtime.session import ModelSession

Feeds = Mapping[str, NDArray[Any]]
"""Graph input name -> array: integers ``[batch, seq]``, or float32 ``[batch, *part.sample]``."""


class Encoder(ModelSession):
    """A session on an encoder graph."""

    def __init__(self, folder: Path, parts: Mapping[str, Part], **options: Any) -> None:
        """As :class:`~lora_edge.runtime.session.ModelSession`, of one part."""
        super().__init__(folder, parts, **options)
        self.part = parts["encoder"]

    def run(self, feeds: Feeds, binding: Binding | None = None) -> NDArray[np.float32]:
        """Run one batch.

        Args:
            feeds: an array for each of ``part.inputs``; text padded on the right (see
                :meth:`feeds`).
            binding: the adapters of the rows; None is off on every row.

        Returns:
            The graph's output: ``[batch, labels]``, ``[batch, seq, labels]`` or
            ``[batch, seq, hidden]``; what stands at padded places means nothing.

        Raises:
            DataError: arrays that are missing, too many, of another shape or dtype; ids outside
                the vocabulary, too long a row, a mask with holes or padded on the left; or a
                binding for another batch.
        """
        arrays = self._checked(feeds)
        batch = len(next(iter(arrays.values())))
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        return self.graphs["encoder"].run(values, self._bound(binding, batch), self.part.output)

    def feeds(
        self, rows: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None
    ) -> dict[str, NDArray[np.int64]]:
        """The arrays of rows of token ids, padded on the right.

        Args:
            rows: token ids, special tokens included, at least one each.
            types: token types, as long as the rows; None: all 0. Passed over where the model has
                none.

        Raises:
            DataError: no rows, an empty one, types of other lengths, or a model of images.
        """
        if self.part.sample:
            raise DataError("the model takes images, not token ids", "Give pixel_values.")
        lengths = [len(row) for row in rows]
        if not lengths or min(lengths) < 1:
            raise DataError(
                f"rows of {lengths} tokens were given, expected at least one row of at least one",
                "Give a text.",
            )
        if types is not None and [len(row) for row in types] != lengths:
            raise DataError("the token types are not as long as the rows", "Give one per token.")
        shape = len(rows), max(lengths)
        arrays = {
            "input_ids": np.full(shape, self.part.pad_token_id, np.int64),
            "attention_mask": np.zeros(shape, np.int64),
            "token_type_ids": np.zeros(shape, np.int64),
        }
        for index, length in enumerate(lengths):
            arrays["input_ids"][index, :length] = rows[index]
            arrays["attention_mask"][index, :length] = 1
            if types is not None:
                arrays["token_type_ids"][index, :length] = types[index]
        return {name: arrays[name] for name in self.part.inputs}

    def _checked(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        odd = sorted(set(feeds) ^ set(self.part.inputs))
        if odd:
            what = "was not given" if odd[0] in self.part.inputs else "is no input of the model"
            raise DataError(f"{odd[0]} {what}", f"Give {', '.join(self.part.inputs)}.")
        arrays = {name: np.asarray(feeds[name]) for name in self.part.inputs}
        if self.part.sample:
            return {name: self._image(array) for name, array in arrays.items()}
        shape = arrays["input_ids"].shape
        for name, array in arrays.items():
            if array.ndim != 2 or array.shape != shape or 0 in shape:
                raise DataError(
                    f"{name} is {list(array.shape)} and input_ids {list(shape)}, expected the same "
                    "[batch, seq]",
                    "Pass them as the tokenizer returned them.",
                )
            if not np.issubdtype(array.dtype, np.integer):
                raise DataError(f"{name} is {array.dtype}, expected integers", "Pass int64.")
        ids, mask = arrays["input_ids"], arrays["attention_mask"]
        outside = ids[(ids < 0) | (ids >= self.part.vocab_size)]
        if outside.size:
            raise DataError(
                f"token id {outside[0]} is outside the vocabulary of {self.part.vocab_size}",
                "Encode the text with the bundle's own tokenizer.",
            )
        if shape[1] > self.part.max_length:
            raise DataError(
                f"a row has {shape[1]} tokens; the model has {self.part.max_length} positions",
                "Shorten the text, or let it be cut.",
            )
        if not np.isin(mask, (0, 1)).all() or (mask[:, :-1] < mask[:, 1:]).any() or 0 in mask[:, 0]:
            raise DataError(
                "attention_mask is not ones followed by zeros in every row",
                "Pad on the right only, and give every row at least one token.",
            )
        return {name: np.ascontiguousarray(array, np.int64) for name, array in arrays.items()}

    def _image(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        sizes = ", ".join(map(str, self.part.sample))
        if pixels.shape[1:] != self.part.sample or 0 in pixels.shape or pixels.dtype != np.float32:
            raise DataError(
                f"pixel_values is {list(pixels.shape)} {pixels.dtype}, expected [batch, {sizes}] "
                "float32",
                "Prepare the images by the bundle's own preprocessor_config.json.",
            )
        return np.ascontiguousarray(pixels)
