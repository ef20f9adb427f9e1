"""One decoder graph in one ONNX Runtime session.

Knows tensors and token ids; knows nothing of bundles, adapters' names or text.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_edge.bundle.part import Cache, Part, StaticGraph
from lora_edge.errors import BundleError, DataError
from lora_edge.names import (
    ENCODER_MASK,
    ENCODER_STATES,
    LOGITS_POSITIONS,
    NUM_LOGITS_TO_KEEP,
    SELECT,
    parse_lora_input,
)
from lora_edge.runtime.adapters.binding import Binding, Values
from lora_edge.runtime.caches import ConcatenatedCache, NoCache, SharedCache
from lora_edge.runtime.decoding import Decoding
from lora_edge.runtime.session import ModelSession, past_names, present_names

_COUNTED = (NUM_LOGITS_TO_KEEP, LOGITS_POSITIONS)
_FED = ("input_ids", "attention_mask", "position_ids", *_COUNTED)
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

_CACHES: Mapping[str | None, Callable[..., Decoding]] = {
    None: NoCache,
    "shared": SharedCache,
    "concatenated": ConcatenatedCache,
}
_serial = itertools.count()
_ANY_LENGTH = 1 << 31  # where positions are relative


class Decoder(ModelSession):
    """A session on a decoder graph, and the way its cache and padding are handled."""

    def __init__(self, folder: Path, parts: Mapping[str, Part], **options: Any) -> None:
        """As :class:`~lora_edge.runtime.session.ModelSession`; one of the parts is a decoder."""
        super().__init__(folder, parts, **options)
        self.part = parts["decoder"]
        path = folder / self.part.file
        cache = self.part.cache
        self.past_names = () if cache is None else past_names(cache)
        self.present_names = () if cache is None else present_names(cache)
        if self.part.form == "fused" and (cache is None or cache.kind != "shared"):
            raise BundleError(
                f"{path}: a fused graph must take a shared cache", "Export the bundle again."
            )
        inputs = self.graphs["decoder"].inputs
        context = () if cache else (ENCODER_STATES, ENCODER_MASK)
        fed = {*_FED, *self.past_names, *context}
        odd = [x for x in inputs if x not in fed and x != SELECT and not parse_lora_input(x)]
        if odd:
            what = f" of {cache.layers} layers" if cache else ""
            raise BundleError(
                f"{path} has the input {odd[0]}, which a decoder{what} has no value for",
                "Export the bundle again.",
            )
        self.inputs = frozenset(inputs)
        self.serial = next(_serial)  # tells its buffers from those of other sessions
        kinds = {inputs[name] for name in self.past_names}
        if kinds - set(_DTYPES):
            raise BundleError(
                f"{path}: {self.past_names[0]} is a {min(kinds)}, expected {' or '.join(_DTYPES)}",
                "Export the bundle again.",
            )
        self.cache_dtype = np.dtype(_DTYPES[min(kinds, default="tensor(float)")])

    @property
    def session(self) -> Any:
        """The decoder's ``onnxruntime.InferenceSession``; another may take its place."""
        return self.graphs["decoder"].session

    @session.setter
    def session(self, session: Any) -> None:
        self.graphs["decoder"] = self.graphs["decoder"]._replace(session=session)

    @property
    def pools(self) -> bool:
        """Buffers and IO bindings are used again: it is ONNX Runtime's own CPU provider.

        Others may copy an input when it is bound, or read a cache's unwritten places.
        """
        return self.provider.target.name == "cpu"

    @property
    def static(self) -> StaticGraph | None:
        """What is fixed of its graph; None: its shapes are not fixed."""
        return self.part.static if self.part.is_static else None

    @property
    def longest(self) -> int:
        """Positions that the model has, or its graph with fixed shapes."""
        return self.part.max_length or _ANY_LENGTH if self.static is None else self.static.room

    @property
    def whose(self) -> str:
        """What has so few positions, for people."""
        return "the model" if self.static is None else "the graph with fixed shapes"

    @property
    def kept(self) -> Cache:
        """The sizes of its cache.

        Raises:
            ValueError: it has none.
        """
        if self.part.cache is None:
            raise ValueError("this decoder has no cache")
        return self.part.cache

    @property
    def keeps_last(self) -> bool:
        """The graph computes the logits of each row's last token alone, where it is asked to."""
        return not self.inputs.isdisjoint(_COUNTED)

    def start(
        self,
        batch: int,
        max_length: int,
        binding: Binding | None = None,
        context: Values | None = None,
    ) -> Decoding:
        """A new batch of sequences with an empty cache.

        Args:
            batch: number of rows.
            max_length: longest sequence, prompt and new tokens together; the shared cache has at
                least so many positions.
            binding: the adapters of the rows; None is off on every row.
            context: what else the graph reads, the same at every step: input name -> OrtValue, such
                as an encoder's states.

        Raises:
            DataError: no rows, more positions than the model has or the memory holds, or a binding
                for another batch.
        """
        if batch < 1:
            raise DataError(f"the batch has {batch} rows, expected at least 1", "Give a prompt.")
        if not 1 <= max_length <= self.longest:
            raise DataError(
                f"{max_length} positions were asked for; {self.whose} has {self.longest}",
                "Shorten the prompt, or lower max_new_tokens.",
            )
        kind = _CACHES[None if self.part.cache is None else self.part.cache.kind]
        if self.static is not None:
            from lora_edge.runtime.static_cache import StaticCache, StaticRows  # few need it

            kind = StaticCache if batch == 1 else StaticRows
        try:
            return kind(self, batch, max_length, self._bound(binding, batch), context or {})
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
