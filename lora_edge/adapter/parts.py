"""What an adapter consists of, as PEFT has it: low-rank pairs, token rows, stacked factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lora_edge.maths.lora import (
    Factors,
    FloatArray,
    WideArray,
    dora_gain,
    fold,
    scaling,
    ungrouped,
)


@dataclass(frozen=True)
class LowRank:
    """The low-rank pair of one module, in PEFT's orientation.

    Attributes:
        path: module path in the base model.
        kind: what the module is: ``linear`` (Conv1D of GPT-2 too), ``embedding`` or ``conv``.
        a: ``[r, in]``; an embedding's ``[r, vocab]``; a convolution's ``[r, channels, *kernel]``.
        b: ``[out, r]``; a convolution's ``[out, r / groups]``.
        alpha: the alpha that applies to this module.
        scaling: the factor on ``b @ a``.
        magnitude: DoRA's m, ``[out]``; ``None`` without DoRA.
        bias: ``lora_bias``'s bias of B, ``[out]``, not scaled; ``None`` without.
    """

    path: str
    kind: Literal["linear", "embedding", "conv"]
    a: FloatArray
    b: FloatArray
    alpha: float
    scaling: float
    magnitude: FloatArray | None = None
    bias: FloatArray | None = None

    @property
    def rank(self) -> int:
        """r, the number of rows of a."""
        return int(self.a.shape[0])

    @property
    def changes(self) -> bool:
        """Whether it has an effect: it has DoRA's magnitude, a bias, or factors that are not 0."""
        if self.magnitude is not None:
            return True
        own = self.bias is not None and self.bias.any()
        return bool(self.scaling != 0 and (own or (self.a.any() and self.b.any())))

    @property
    def in_features(self) -> int:
        """Size of the input: of a convolution channels * kernel, of an embedding the vocabulary."""
        return math.prod(self.a.shape[1:])

    @property
    def out_features(self) -> int:
        """Size of the layer's output."""
        return int(self.b.shape[0])

    def factors(self) -> Factors:
        """The pair in the graph's orientation, scaling folded into B in fp32; without DoRA."""
        a = self.a.reshape(self.rank, -1)
        b = self.b if self.b.shape[1] == self.rank else ungrouped(self.b, self.rank)
        return fold(a, b, self.scaling)

    def delta(self) -> WideArray:
        """``s BA`` as ``[out, in] float64``, without DoRA."""
        a = self.a.reshape(self.rank, -1).astype(np.float64)
        b = self.b if self.b.shape[1] == self.rank else ungrouped(self.b, self.rank)
        change: WideArray = self.scaling * (b.astype(np.float64) @ a)
        return change

    def gain(self, weight: WideArray) -> WideArray | None:
        """DoRA's g of each output, from the base's ``W``; ``None`` without DoRA.

        Args:
            weight: ``[out, in]``, of a grouped convolution ``[out, in / groups]``, as its kernel.
        """
        if self.magnitude is None:
            return None
        a = self.a.reshape(self.rank, -1).astype(np.float64)
        # PEFT pairs the outputs of a grouped B in its own way, for this norm alone (dora.py).
        change = self.b.reshape(-1, self.rank).astype(np.float64) @ a
        return dora_gain(self.magnitude, weight + self.scaling * change.reshape(weight.shape))


@dataclass(frozen=True)
class TokenRows:
    """Trained rows of an embedding, which replace the base's.

    Attributes:
        path: module path of the embedding (or of an output layer).
        indices: token ids, ``k`` of them.
        rows: ``[k, dim]``.
    """

    path: str
    indices: tuple[int, ...]
    rows: FloatArray


@dataclass(frozen=True)
class StackedFactors:
    """The factors of a module's parameters (``target_parameters``), as PEFT saved them.

    Which of them belongs to which parameter is known when the base is
    (:mod:`lora_edge.maths.experts`).

    Attributes:
        path: module path, e.g. ``model.layers.0.mlp.experts``.
        levels: how deep the wrapper lies -> ``(A [E * r, in], B [out, r * E])``.
        alphas: name of a parameter that may be targeted -> its rank and alpha.
        rslora: the scaling is ``alpha / sqrt(r)``.
    """

    path: str
    levels: Mapping[int, tuple[FloatArray, FloatArray]]
    alphas: Mapping[str, tuple[int, float]]
    rslora: bool

    def scaling(self, name: str) -> float:
        """The factor on the product of a parameter's factors."""
        rank, alpha = self.alphas[name]
        return scaling(alpha, rank, rslora=self.rslora)

    def as_linear(self, *, transposed: bool) -> LowRank | None:
        """The same change as a pair of a linear layer; ``None`` if it is not of its weight alone.

        Args:
            transposed: the layer keeps its weight as ``[in, out]``.
        """
        if set(self.levels) != {0} or set(self.alphas) != {"weight"}:
            return None
        a, b = self.levels[0]
        rank, alpha = self.alphas["weight"]
        if a.shape[0] != rank:
            return None
        if transposed:
            a, b = np.ascontiguousarray(b.T), np.ascontiguousarray(a.T)
        return LowRank(self.path, "linear", a, b, alpha, self.scaling("weight"))
