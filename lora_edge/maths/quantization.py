"""Weights of few bits: rounded to the nearest of each block's codes, and what the codes mean.

``w = scale * (code - zero)``, for blocks of consecutive inputs of one output, as ONNX Runtime's
``MatMulNBits`` has them. Deterministic and plain numpy, so that whoever has the base model gets the
same weights again: the graph's codes, the norms of DoRA and PyTorch's reference all come from here.
Source of the layout: ONNX Runtime, ContribOperators.md, com.microsoft.MatMulNBits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lora_edge.files.schema import Rule, between

Precision = Literal["fp32", "int8", "int4"]
Activations = Literal["fp32", "int8"]
BITS: Mapping[str, int] = {"int8": 8, "int4": 4}
BLOCK_SIZE = 32


@dataclass(frozen=True)
class Quantization:
    """Which layers of a base are quantized, and how.

    Attributes:
        bits: of a code, 4 or 8.
        block_size: consecutive inputs that share a scale and a zero point.
        layers: module paths of the linear layers whose weights are rounded.
        mean_error: ‖W − Q(W)‖ / ‖W‖ of a layer, their mean.
        worst_error: the largest of them.
    """

    bits: Annotated[int, Rule("4 or 8", (4, 8).__contains__)]
    block_size: Annotated[int, between(1, 1 << 16)]
    layers: tuple[str, ...]
    mean_error: float = 0.0
    worst_error: float = 0.0

    def rounded(self, weight: NDArray[np.floating]) -> NDArray[np.float32]:
        """A weight ``[out, in]`` as the quantized layer has it, float32."""
        return quantize(weight, self.bits, self.block_size).weight()


@dataclass(frozen=True)
class Blocks:
    """A quantized weight.

    Attributes:
        codes: ``[out, blocks, block_size]``, uint8; the last block is filled up with zero points.
        scales: ``[out, blocks]``, float32.
        zeros: ``[out, blocks]``, uint8.
        in_features: number of inputs.
        bits: of a code.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8]
    in_features: int
    bits: int

    def weight(self) -> NDArray[np.float32]:
        """The weight that the codes mean, ``[out, in]``, float32."""
        steps = self.codes.astype(np.float32) - self.zeros[..., None].astype(np.float32)
        values = steps * self.scales[..., None]
        return values.reshape(len(values), -1)[:, : self.in_features]

    def packed(self) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
        """Codes, scales and zero points as ``MatMulNBits`` reads them.

        Returns:
            ``[out, blocks, block_size * bits / 8]``, ``[out * blocks]`` and
            ``[out * ceil(blocks * bits / 8)]``; of two codes of 4 bits the first is the lower half.
        """
        codes = _halves(self.codes, self.bits)
        zeros = _halves(self.zeros, self.bits)
        return codes, self.scales.reshape(-1), zeros.reshape(-1)


def quantize(weight: NDArray[np.floating], bits: int, block_size: int = BLOCK_SIZE) -> Blocks:
    """Round a weight to the nearest codes; each block's range, with zero in it, is spread evenly.

    Args:
        weight: ``[out, in]``.
        bits: 4 or 8.
        block_size: inputs of a block.
    """
    values = np.asarray(weight, np.float32)
    size_out, size_in = values.shape
    padded = np.pad(values, ((0, 0), (0, -size_in % block_size)))
    blocks = padded.reshape(size_out, -1, block_size)
    largest = 2**bits - 1
    low = np.minimum(blocks.min(axis=2), 0)
    high = np.maximum(blocks.max(axis=2), 0)
    scales = ((high - low) / np.float32(largest)).astype(np.float32)
    scales[scales == 0] = 1  # a block of zeros
    zeros = np.clip(np.rint(-low / scales), 0, largest)
    codes = np.clip(np.rint(blocks / scales[..., None]) + zeros[..., None], 0, largest)
    return Blocks(codes.astype(np.uint8), scales, zeros.astype(np.uint8), size_in, bits)


def _halves(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes of 4 bits two to a byte, along the last axis; others as they are."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    return np.bitwise_or(codes[..., ::2], np.left_shift(codes[..., 1::2], 4), dtype=np.uint8)


class _Layer(Protocol):
    @property
    def transposed(self) -> bool: ...


Weights = Callable[[str], "NDArray[np.floating] | None"]


def measured(
    bits: int, paths: Sequence[str], weights: Weights, layers: Mapping[str, _Layer]
) -> Quantization:
    """How these layers are quantized, with the errors of their weights.

    Args:
        bits: of a code, 4 or 8.
        paths: module paths of the layers.
        weights, layers: as :func:`rounded_weights` has them.
    """
    plain = Quantization(bits, BLOCK_SIZE, tuple(paths))
    after = rounded_weights(weights, plain, layers)
    errors = [0.0]
    for parameter in (f"{path}.weight" for path in paths):
        weight, rounded = weights(parameter), after(parameter)
        assert weight is not None
        assert rounded is not None
        size = float(np.linalg.norm(weight))
        errors.append(float(np.linalg.norm(rounded - weight)) / size if size else 0.0)
    mean = sum(errors) / max(len(paths), 1)
    return dataclasses.replace(plain, mean_error=mean, worst_error=max(errors))


def rounded_weights(
    weights: Weights, quantization: Quantization | None, layers: Mapping[str, _Layer]
) -> Weights:
    """A checkpoint's parameters as the quantized model has them.

    Args:
        weights: parameter path -> the checkpoint's value, ``None`` where it has none.
        quantization: ``None``: as they are.
        layers: module path -> layer, which says how the checkpoint keeps a linear weight.
    """
    if quantization is None:
        return weights
    quantized = set(quantization.layers)

    def value(parameter: str) -> NDArray[np.floating] | None:
        found = weights(parameter)
        path, _, own = parameter.rpartition(".")
        if found is None or own != "weight" or path not in quantized:
            return found
        if layers[path].transposed:
            return quantization.rounded(found.T).T
        return quantization.rounded(found)

    return value
