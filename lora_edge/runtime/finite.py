"""What a model gives must be numbers: NaN would be taken for token 0, infinity for certainty."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from lora_edge.errors import DataError

Array = TypeVar("Array", bound="NDArray[np.floating]")


def finite(values: Array) -> Array:
    """The values, if all are finite.

    Raises:
        DataError: one is NaN or infinite.
    """
    if not np.isfinite(values).all():
        raise not_finite()
    return values


def not_finite() -> DataError:
    """The error of outputs that are NaN or infinite."""
    return DataError(
        "the model's outputs are not finite (NaN or Inf): its numbers overflow what it computes in",
        "Give the adapters smaller weights, or compute a bundle of fp16 in float32 (--exact); if "
        "that is not it, check the bundle with: "
        "lora-edge validate DIR",
    )
