"""The new value of one parameter, as a function of the base's: one class for each kind of change.

Knows the maths; knows nothing of whole adapters or models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_edge.adapter.parts import LowRank, TokenRows
from lora_edge.maths.experts import ExpertLora, ExpertPlace
from lora_edge.maths.lora import FloatArray, WideArray


@dataclass(frozen=True)
class Experts:
    """A LoRA of stacked experts."""

    lora: ExpertLora

    def __call__(self, base: WideArray | None) -> WideArray:
        assert base is not None
        if base.ndim == 2:
            return base + self.lora.delta(0)
        return np.stack([matrix + self.lora.delta(i) for i, matrix in enumerate(base)])


@dataclass(frozen=True)
class OneExpert:
    """A low-rank pair of one expert's rows of a stack."""

    place: ExpertPlace
    module: LowRank

    def __call__(self, base: WideArray | None) -> WideArray:
        assert base is not None
        changed = base.copy()
        rows = slice(self.place.first, self.place.first + self.place.size[0])
        part = changed[self.place.expert, rows]
        changed[self.place.expert, rows] = Adapted(self.module)(part)
        return changed


@dataclass(frozen=True)
class Constant:
    """Another value in place of the base's."""

    value: FloatArray

    def __call__(self, base: WideArray | None) -> WideArray:  # noqa: ARG002
        return self.value.astype(np.float64)


@dataclass(frozen=True)
class Rows:
    """Trained rows in place of the base's."""

    tokens: TokenRows

    def __call__(self, base: WideArray | None) -> WideArray:
        assert base is not None
        changed = base.copy()
        changed[list(self.tokens.indices)] = self.tokens.rows
        return changed


@dataclass(frozen=True)
class Shift:
    """A change that is added."""

    change: WideArray

    def __call__(self, base: WideArray | None) -> WideArray:
        return self.change if base is None else base + self.change


@dataclass(frozen=True)
class Adapted:
    """A low-rank pair, with DoRA's gain where it has one."""

    module: LowRank

    def __call__(self, base: WideArray | None) -> WideArray:
        assert base is not None
        module = self.module
        if module.kind == "embedding":
            return self._adapted(base.T, module.gain(base.T)).T
        if module.kind == "conv":
            kernel = dense_kernel(base, module.in_features)
            gain = module.gain(base.reshape(len(base), -1))
            return self._adapted(kernel.reshape(len(kernel), -1), gain).reshape(kernel.shape)
        return self._adapted(base, module.gain(base))

    def _adapted(self, weight: WideArray, gain: WideArray | None) -> WideArray:
        adapted = weight + self.module.delta()
        return adapted if gain is None else adapted * gain[:, None]


def dense_kernel(kernel: WideArray, in_features: int) -> WideArray:
    """A convolution's kernel ``[out, channels / groups, *k]`` without groups, block by block.

    PEFT's A reads all channels, so a change of a grouped convolution is dense.

    Args:
        kernel: of any number of groups.
        in_features: all channels times the size of ``k``.
    """
    out, share, *size = kernel.shape
    channels = in_features // int(np.prod(size))
    if share == channels:
        return kernel
    groups = channels // share
    dense = np.zeros((out, channels, *size))
    for group in range(groups):
        rows = slice(group * out // groups, (group + 1) * out // groups)
        dense[rows, group * share : (group + 1) * share] = kernel[rows]
    return dense
