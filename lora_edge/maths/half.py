"""Numbers in float16: which a weight has, which it cannot hold.

Plain numpy. Of a base in float16, what is stored so is each parameter of two dimensions and more;
vectors (norms, biases) are few bytes, and stay float32 in the file.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HALF_BITS = 16
LARGEST_HALF = float(np.finfo(np.float16).max)
"""65504."""


def is_halved(values: NDArray[np.generic]) -> bool:
    """Whether a parameter with these values is float16 in a bundle of fp16."""
    return values.dtype.kind == "f" and values.ndim > 1


def halved(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """A parameter as float16 has it, float32; a vector as it is."""
    if not is_halved(values):
        return values
    with np.errstate(over="ignore"):  # what does not fit is refused by name elsewhere
        return values.astype(np.float16).astype(np.float32)


def overflow(values: NDArray[np.floating]) -> float:
    """The number that is farthest from 0, if float16 cannot hold it; else 0."""
    if not values.size:
        return 0.0
    largest = max(float(values.max()), -float(values.min()))
    with np.errstate(over="ignore"):
        return largest if np.isfinite(largest) and np.isinf(np.float16(largest)) else 0.0
