"""Token ids as people hand them over -> rows without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_edge.errors import DataError
from lora_edge.types import listed, refused

_AS_GIVEN = "Pass it as the tokenizer returned it."


def token_rows(
    input_ids: Any, attention_mask: Any | None
) -> tuple[list[list[int]], list[int], int]:
    """Strip the padding of a batch.

    Args:
        input_ids: ``[batch, seq]`` integers, or rows of unequal lengths.
        attention_mask: ``[batch, seq]`` of 0 and 1, or None for all ones.

    Returns:
        The rows, the column at which each starts, and the batch's width.

    Raises:
        DataError: no rows, an empty row, ids that are not integers, a mask of another shape, with
            other values or with holes.
    """
    listed("input_ids", input_ids)
    if attention_mask is None:
        rows = [_integers(index, row) for index, row in enumerate(input_ids)]
        _refuse_empty(rows)
        return rows, [0] * len(rows), max(map(len, rows))
    listed("attention_mask", attention_mask)
    if len({len(listed("a row of input_ids", row)) for row in input_ids}) > 1:
        raise DataError(
            "rows of unequal lengths came with an attention mask",
            "Leave the mask out; rows of unequal lengths need no padding.",
        )
    if len({len(listed("a row of attention_mask", row)) for row in attention_mask}) > 1:
        raise refused(
            "attention_mask", "of rows of unequal lengths", "[batch, seq] as input_ids", _AS_GIVEN
        )
    ids, mask = np.asarray(input_ids), np.asarray(attention_mask)
    if ids.shape != mask.shape or ids.ndim != 2:
        raise DataError(
            f"input_ids is {list(ids.shape)} and attention_mask {list(mask.shape)}, expected the "
            "same [batch, seq]",
            _AS_GIVEN,
        )
    if not np.isin(mask, (0, 1)).all():
        raise DataError("attention_mask has values other than 0 and 1", "Pass 0 or 1.")
    rows, starts = [], []
    for index, (row, kept) in enumerate(zip(ids, mask.astype(bool), strict=True)):
        places = np.flatnonzero(kept)
        if places.size and places[-1] - places[0] + 1 != places.size:
            raise DataError(
                f"the attention mask of row {index} has holes",
                "Pad on the left or on the right only.",
            )
        if places.size and places[0] > 0 and places[-1] < mask.shape[1] - 1:
            raise DataError(
                f"the attention mask of row {index} is padded on both sides",
                "Pad on the left or on the right only.",
            )
        rows.append(_integers(index, row[kept]))
        starts.append(int(places[0]) if places.size else 0)
    _refuse_empty(rows)
    return rows, starts, int(mask.shape[1])


def _integers(index: int, row: Any) -> list[int]:
    try:
        array = np.asarray(row)
    except (ValueError, OverflowError) as error:  # rows in a row, of unequal lengths
        raise refused(f"row {index}", row, "a list of integers", _AS_GIVEN) from error
    if array.size and (array.ndim != 1 or not np.issubdtype(array.dtype, np.integer)):
        raise DataError(
            f"row {index} is {array.ndim}-dimensional {array.dtype}, expected a list of integers",
            "Pass [batch, seq] token ids.",
        )
    return [int(token) for token in array]


def _refuse_empty(rows: Sequence[Sequence[int]]) -> None:
    if not rows:
        raise DataError("the batch is empty, expected at least one row", "Give a prompt.")
    for index, row in enumerate(rows):
        if not row:
            raise DataError(
                f"row {index} has no tokens, expected at least 1", "Give a non-empty prompt."
            )
