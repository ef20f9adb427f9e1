"""Tokenized examples -> padded tensors, and the order in which they come.

Knows torch and token ids; knows nothing of files, tokenizers or models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

from lora_edge.training.tokens import (
    IGNORED,
    ClassifiedExample,
    ImageExample,
    PackedExample,
    Tokenized,
    TokenizedExample,
)

_GROUP = 50  # batches among which examples are sorted, as in transformers' LengthGroupedSampler


def collate(
    examples: Sequence[Tokenized],
    pad_id: int,
    *,
    types: bool = False,
    pixels: Callable[[Sequence[str]], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """``input_ids``, ``attention_mask`` ``[batch, seq] int64``, right-padded, and ``labels``.

    ``labels`` is ``[batch, seq]``, or ``[batch]`` for a classifier; with ``types``, a classifier
    also gets ``token_type_ids``. Packed rows have ``position_ids`` in place of the mask, which
    keep the parts of a row apart. Images give ``pixel_values [batch, channels, height, width]``.

    Args:
        examples: of one kind.
        pad_id: token id on padding.
        types: the model takes token types.
        pixels: reads images, for :class:`ImageExample`.
    """
    if isinstance(examples[0], ImageExample):
        images = [example for example in examples if isinstance(example, ImageExample)]
        if pixels is None:
            raise ValueError("images need a reader of pixels")
        labels = torch.tensor([image.label for image in images])
        return {"pixel_values": pixels([image.path for image in images]), "labels": labels}
    texts = [example for example in examples if not isinstance(example, ImageExample)]
    width = max(len(example.input_ids) for example in texts)

    def padded(rows: Sequence[tuple[int, ...]], fill: int) -> torch.Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])

    batch = {"input_ids": padded([example.input_ids for example in texts], pad_id)}
    packed = [example for example in texts if isinstance(example, PackedExample)]
    if packed:
        batch["position_ids"] = padded([example.positions for example in packed], 0)
        batch["labels"] = padded([example.labels for example in packed], IGNORED)
        return batch
    batch["attention_mask"] = padded([(1,) * len(example.input_ids) for example in texts], 0)
    classified = [example for example in texts if isinstance(example, ClassifiedExample)]
    if classified:
        batch["labels"] = torch.tensor([example.label for example in classified])
        if types:
            batch["token_type_ids"] = padded([example.type_ids for example in classified], 0)
    else:
        paired = [example for example in texts if isinstance(example, TokenizedExample)]
        batch["labels"] = padded([example.labels for example in paired], IGNORED)
    return batch


def size_of(example: Tokenized) -> int:
    """Tokens of an example, 1 for an image."""
    return 1 if isinstance(example, ImageExample) else len(example.input_ids)


class LengthGroups(Sampler[int]):
    """Shuffled, but with examples of like length side by side: less padding.

    Each epoch has an order of its own that follows from the seed alone, so that a resumed run meets
    the same one.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each pass."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        span = self._batch_size * _GROUP
        groups = [
            sorted(order[start : start + span], key=lambda index: -self._lengths[index])
            for start in range(0, len(order), span)
        ]
        flat = [index for group in groups for index in group]
        batches = [
            flat[start : start + self._batch_size]
            for start in range(0, len(flat), self._batch_size)
        ]
        # The short last batch stays last; the others come in any order.
        whole = [batch for batch in batches if len(batch) == self._batch_size]
        rest = flat[len(whole) * self._batch_size :]
        shuffled = torch.randperm(len(whole), generator=generator).tolist()
        return iter([index for number in shuffled for index in whole[number]] + rest)
