"""The maths of LoRA on numpy arrays: scaling, folding, deltas, concatenation along the rank.

Knows nothing of files, graphs or runtimes. Two orientations occur and are never mixed:

* PEFT's: ``lora_A [r, in]``, ``lora_B [out, r]`` (as ``torch.nn.Linear``), written ``a``, ``b``;
* the graph's: ``A [in, R]``, ``B [R, out]``, scaling folded into ``B``, in :class:`Factors`.

Source of the formulas: Hu et al. 2021 (arXiv:2106.09685) for ``ΔW = (alpha / r) BA``; Kalajdzievski
2023 (arXiv:2312.03732) for rsLoRA's ``alpha / sqrt(r)``; ``peft/tuners/lora/layer.py`` for both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Factors:
    """One site's low-rank pair in the graph's orientation, scaling folded in.

    Attributes:
        A: ``[in, R] float32``.
        B: ``[R, out] float32``.
    """

    A: FloatArray
    B: FloatArray

    @property
    def rank(self) -> int:
        """R, the number of columns of A."""
        return int(self.A.shape[1])


def scaling(alpha: float, rank: int, *, rslora: bool) -> float:
    """``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def fold(a: NDArray[np.floating], b: NDArray[np.floating], scale: float) -> Factors:
    """PEFT's ``a [r, in]``, ``b [out, r]`` -> the graph's, ``scale`` folded into B in fp32."""
    folded = b.astype(np.float32).T * np.float32(scale)
    return Factors(np.ascontiguousarray(a.astype(np.float32).T), np.ascontiguousarray(folded))


def delta(factors: Factors) -> NDArray[np.float64]:
    """``ΔWᵀ = A @ B`` as ``[in, out] float64``, wide enough to be rounded once when merged."""
    return factors.A.astype(np.float64) @ factors.B.astype(np.float64)


def zeros(in_features: int, out_features: int, rank: int) -> Factors:
    """Factors that change nothing; ``rank`` may be 0 where the execution provider takes it."""
    return Factors(
        np.zeros((in_features, rank), np.float32), np.zeros((rank, out_features), np.float32)
    )


def concatenate(parts: Sequence[tuple[Factors, float]]) -> Factors:
    """The weighted sum of effects as one pair: concatenated along R, weights folded into B.

    Exact: ``Σ wᵢ AᵢBᵢ = [A₁ … Aₙ] @ [w₁B₁; …; wₙBₙ]``.
    """
    return Factors(
        np.concatenate([factors.A for factors, _ in parts], axis=1),
        np.concatenate([factors.B * np.float32(weight) for factors, weight in parts], axis=0),
    )


def row_gate(ranks: Sequence[int], weights: NDArray[np.floating]) -> FloatArray:
    """Gate of a mixed batch over adapters concatenated along the rank.

    Args:
        ranks: the rank of each concatenated adapter at the site, in order; they sum to R.
        weights: ``[batch, len(ranks)]``, the weight of each adapter on each row (0: absent).

    Returns:
        ``[batch, 1, R] float32``: each adapter's weight repeated over its own columns of A.
    """
    return np.repeat(np.asarray(weights, np.float32), ranks, axis=1)[:, None, :]
