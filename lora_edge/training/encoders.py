"""Rows of data -> examples for one base: one class for each kind of data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from lora_edge.base.checkpoint import Base
from lora_edge.errors import BaseModelError
from lora_edge.training.data import ChatExample, DataFile, Example, LabelledExample, Row
from lora_edge.training.images import Pixels
from lora_edge.training.loop import Batches
from lora_edge.training.model import load_tokenizer
from lora_edge.training.settings import Settings
from lora_edge.training.tokens import (
    ClassifiedExample,
    ImageExample,
    Tokenized,
    TokenizedExample,
    classify,
    tokenize,
)

_DEFAULT_LENGTH = 1024


class RowEncoder(ABC):
    """Makes examples of rows.

    Attributes:
        batches: makes batches of the examples.
        completes: the examples are of a text generator, which can be packed, and whose logits are
            needed at the targets only.
    """

    batches: Batches
    completes: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, rows: Sequence[Row], drop: Callable[[str], None]) -> tuple[Tokenized, ...]:
        """The examples; ``drop`` is called with each that has no target."""

    def settle(self, model: Any) -> None:
        """Tell a model what fills up short rows, by which a decoder finds a row's last token."""
        if getattr(model.config, "pad_token_id", 0) is None:
            model.config.pad_token_id = self.batches.pad_id


class _Tokens(RowEncoder):
    """What texts have in common."""

    def __init__(self, base: Base, source: DataFile, settings: Settings) -> None:
        self._base, self._settings, self._labels = base, settings, source.labels
        self._tokenizer = load_tokenizer(base)
        self._length = max_length(base, settings)
        pad = self._tokenizer.pad_token_id
        if pad is None:
            pad = self._tokenizer.eos_token_id
        types = "token_type_ids" in self._tokenizer.model_input_names
        self.batches = Batches(0 if pad is None else pad, types)


class _Generated(_Tokens):
    """Prompts with completions, and conversations."""

    completes = True

    def __call__(self, rows: Sequence[Row], drop: Callable[[str], None]) -> tuple[Tokenized, ...]:
        texts = [row for row in rows if isinstance(row, (Example, ChatExample))]
        given = drop if self._settings.drop_too_long else None
        made = tokenize(texts, self._tokenizer, self._length, drop=given)
        _check_vocabulary(self._base, made)
        return made

    def settle(self, model: Any) -> None:
        """Nothing: a generator is trained on what its targets say."""


class _Labelled(_Tokens):
    """Texts with labels."""

    def __call__(self, rows: Sequence[Row], drop: Callable[[str], None]) -> tuple[Tokenized, ...]:  # noqa: ARG002
        labelled = [row for row in rows if isinstance(row, LabelledExample)]
        length = min(self._length, self._tokenizer.model_max_length)
        made = classify(labelled, self._labels, self._tokenizer, length)
        _check_vocabulary(self._base, made)
        return made


class _Images(RowEncoder):
    """Images with labels."""

    def __init__(self, base: Base, source: DataFile, settings: Settings) -> None:
        max_length(base, settings)  # refuses what the base does not have
        self._index = {label: number for number, label in enumerate(source.labels)}
        self.batches = Batches(0, pixels=Pixels(base.directory))

    def __call__(self, rows: Sequence[Row], drop: Callable[[str], None]) -> tuple[Tokenized, ...]:  # noqa: ARG002
        labelled = [row for row in rows if isinstance(row, LabelledExample)]
        return tuple(ImageExample(row.text, self._index[row.label]) for row in labelled)


def encoder_of(base: Base, source: DataFile, settings: Settings) -> RowEncoder:
    """What makes examples of a file's rows.

    Raises:
        BaseModelError: the base has no tokenizer, no image processor or too few positions.
    """
    if source.kind == "image":
        return _Images(base, source, settings)
    return (_Labelled if source.labels else _Generated)(base, source, settings)


def max_length(base: Base, settings: Settings) -> int:
    """Tokens of a row: what is asked for, or what the base has, 1,024 at most."""
    positions = base.config.get("max_position_embeddings") or base.config.get("n_positions")
    if settings.max_length is None:
        return min(_DEFAULT_LENGTH, positions or _DEFAULT_LENGTH)
    if positions and settings.max_length > positions:
        raise BaseModelError(
            f"max_length is {settings.max_length}, but {base.name_or_path} has "
            f"{positions} positions",
            f"Give --max-length {positions} or less.",
        )
    return settings.max_length


def _check_vocabulary(base: Base, examples: Sequence[Tokenized]) -> None:
    size = base.config.get("vocab_size")
    texts = [x for x in examples if isinstance(x, (TokenizedExample, ClassifiedExample))]
    highest = max((max(example.input_ids) for example in texts), default=0)
    if size is not None and highest >= size:
        raise BaseModelError(
            f"{base.name_or_path}: its tokenizer makes token {highest}, but vocab_size is {size}",
            "The tokenizer belongs to another model, or the embeddings must be resized first.",
        )
