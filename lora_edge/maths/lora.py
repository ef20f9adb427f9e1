"""The maths of LoRA on numpy arrays: scaling, folding, deltas, DoRA, concatenation, the gate.

Knows nothing of files, graphs or runtimes. Two orientations occur and are never mixed:

* PEFT's: ``lora_A [r, in]``, ``lora_B [out, r]`` (as ``torch.nn.Linear``), written ``a``, ``b``;
* the graph's: ``A [in, R]``, ``B [R, out]``, scaling folded into ``B``, in :class:`Factors`.

A convolution's kernel is flattened to ``in = channels * kernel``, an embedding has ``in = vocab``.

Source of the formulas: Hu et al. 2021 (arXiv:2106.09685) for ``ΔW = (alpha / r) BA``; Kalajdzievski
2023 (arXiv:2312.03732) for rsLoRA's ``alpha / sqrt(r)``; Liu et al. 2024 (arXiv:2402.09353) for
DoRA; ``peft/tuners/lora/layer.py`` and ``dora.py`` for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_edge.names import FACTOR_PARTS, InputPart

FloatArray = NDArray[np.float32]
WideArray = NDArray[np.float64]


class Factors(NamedTuple):
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


class Head(NamedTuple):
    """A task head that replaces the base's.

    Attributes:
        W: ``[in, labels] float32``.
        c: ``[labels] float32``, its bias; zeros where it has none.
    """

    W: FloatArray
    c: FloatArray

    @property
    def labels(self) -> int:
        """Number of outputs."""
        return int(self.W.shape[1])


class SiteChange(NamedTuple):
    """Everything that one adapter changes at one site, in the graph's orientation.

    Attributes:
        factors: the low-rank pair.
        gain: ``[out] float32``, DoRA's ``g - 1``: that share of the base's output is added to it.
        bias: ``[out] float32``, added to the output.
        weight: ``[dim] float32``, added to a norm's weight.
        head: replaces a task head.
    """

    factors: Factors | None = None
    gain: FloatArray | None = None
    bias: FloatArray | None = None
    weight: FloatArray | None = None
    head: Head | None = None

    @property
    def rank(self) -> int:
        """Rank of the pair, 0 without one."""
        return 0 if self.factors is None else self.factors.rank

    def stacked(self) -> dict[InputPart, FloatArray | None]:
        """The vectors that are stacked over the resident adapters, by graph input."""
        return {"G": self.gain, "bias": self.bias, "weight": self.weight}

    def parts(self) -> tuple[InputPart, ...]:
        """The graph inputs that carry it."""
        found: list[InputPart] = [] if self.factors is None else list(FACTOR_PARTS)
        found += [part for part, vector in self.stacked().items() if vector is not None]
        if self.head is not None:
            found += ["W", "c"]
        return tuple(found)


def scaling(alpha: float, rank: int, *, rslora: bool) -> float:
    """``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def fold(a: NDArray[np.floating], b: NDArray[np.floating], scale: float) -> Factors:
    """PEFT's ``a [r, in]``, ``b [out, r]`` -> the graph's, ``scale`` folded into B in fp32."""
    folded = b.astype(np.float32).T * np.float32(scale)
    return Factors(np.ascontiguousarray(a.astype(np.float32).T), np.ascontiguousarray(folded))


def delta(factors: Factors) -> WideArray:
    """``ΔWᵀ = A @ B`` as ``[in, out] float64``, wide enough to be rounded once when merged."""
    return factors.A.astype(np.float64) @ factors.B.astype(np.float64)


def full_rank(change: WideArray) -> Factors:
    """Any ``ΔW [out, in]`` as a pair of rank ``min(in, out)``: itself and an identity, exactly."""
    out_features, in_features = change.shape
    wanted = np.ascontiguousarray(change.T, np.float32)
    if in_features <= out_features:
        return Factors(np.eye(in_features, dtype=np.float32), wanted)
    return Factors(wanted, np.eye(out_features, dtype=np.float32))


def row_replacement(indices: Sequence[int], change: WideArray, rows: int) -> Factors:
    """A pair that adds ``change [k, dim]`` to k rows of an embedding ``[rows, dim]``."""
    one_hot = np.zeros((rows, len(indices)), np.float32)
    one_hot[list(indices), np.arange(len(indices))] = 1.0
    return Factors(one_hot, np.ascontiguousarray(change, np.float32))


def ungrouped(b: NDArray[np.floating], rank: int) -> NDArray[np.floating]:
    """B of a grouped 1x1 convolution, ``[out, r / groups]`` -> ``[out, r]``, block-diagonal."""
    out_features, share = b.shape
    groups = rank // share
    dense = np.zeros((out_features, rank), b.dtype)
    for group in range(groups):
        rows = slice(group * out_features // groups, (group + 1) * out_features // groups)
        dense[rows, group * share : (group + 1) * share] = b[rows]
    return dense


def dora_gain(magnitude: NDArray[np.floating], adapted: WideArray) -> WideArray:
    """DoRA's ``g = m / ||W + s BA||`` for each output.

    Args:
        magnitude: m, ``[out]``.
        adapted: ``W + s BA``, ``[out, in]``.
    """
    gain: WideArray = magnitude.astype(np.float64) / np.linalg.norm(adapted, axis=1)
    return gain


def zeros(in_features: int, out_features: int, rank: int) -> Factors:
    """Factors that change nothing; ``rank`` may be 0 where the execution provider takes it."""
    return Factors(
        np.zeros((in_features, rank), np.float32), np.zeros((rank, out_features), np.float32)
    )


def widened(factors: Factors, rank: int) -> Factors:
    """The same pair at a higher rank: the columns of A and the rows of B that are new are zeros."""
    nothing = zeros(len(factors.A), factors.B.shape[1], rank - factors.rank)
    return concatenate([(factors, 1.0), (nothing, 1.0)])


def wider(changes: Mapping[str, SiteChange], rank: int) -> tuple[str, int] | None:
    """The first module path whose pair has a larger rank, and that rank; None: there is none."""
    return next(((path, x.rank) for path, x in changes.items() if x.rank > rank), None)


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
        weights: ``[batch, seq | 1, len(ranks)]``, the weight of each adapter on each row and token
            (0: absent).

    Returns:
        ``[batch, seq | 1, R] float32``: each adapter's weight repeated over its own columns of A.
    """
    return np.repeat(np.asarray(weights, np.float32), ranks, axis=2)
