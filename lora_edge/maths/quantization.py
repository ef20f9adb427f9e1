"""Weights of few bits: rounded to codes, block by block, and what the codes mean.

``w = scale * (code - zero)``, for blocks of consecutive inputs of one output, as ONNX Runtime's
``MatMulNBits`` has them. Deterministic and plain numpy, so that whoever has the base model gets the
same weights again: the graph's codes, the norms of DoRA and PyTorch's reference all come from here.
Source of the layout: ONNX Runtime, ContribOperators.md, com.microsoft.MatMulNBits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lora_edge.errors import MissingDependencyError
from lora_edge.files.schema import Rule, between
from lora_edge.maths.half import HALF_BITS, halved

Precision = Literal["fp32", "fp16", "int8", "int4"]
Activations = Literal["fp32", "int8"]
Algorithm = Literal["rtn", "k-quant"]
BITS: Mapping[str, int] = {"fp16": HALF_BITS, "int8": 8, "int4": 4}
BLOCK_SIZE = 32
BLOCK_SIZES = (16, 32, 64, 128)
CHANNEL_BITS = 7
"""Of a code, where an output has one scale (:mod:`lora_edge.graph.channels` says why)."""
_ROWS = 1 << 22  # numbers that are rounded at a time

_Bits = Annotated[int, Rule("4, 8 or 16", (4, 8, HALF_BITS).__contains__)]


class Rounding(NamedTuple):
    """How weights are to be rounded.

    Attributes:
        bits: of a code, 4 or 8; 16: weights are float16, and nothing of the rest matters.
        head_bits: of the output layer's and the token embedding's codes; ``None``: they stay as
            they are.
        block_size: consecutive inputs that share a scale and a zero point.
        symmetric: the zero point is the middle code, so that none is stored.
        algorithm: ``rtn``: a block's range is spread evenly over its codes; ``k-quant``: scale and
            zero point are searched for the least error, weighted by size.
        per_channel: a linear layer has one scale for each output and no zero points.
    """

    bits: int
    head_bits: int | None = 8
    block_size: int = BLOCK_SIZE
    symmetric: bool = False
    algorithm: Algorithm = "rtn"
    per_channel: bool = False


@dataclass(frozen=True)
class Quantization:
    """Which layers of a base are quantized, and how.

    Attributes:
        bits: of a code, 4 or 8; 16: each parameter of two dimensions and more is float16.
        block_size: consecutive inputs that share a scale and a zero point; 1 of float16.
        layers: module paths of the layers whose weights are codes: linear ones, and the token
            embedding; of float16 none.
        mean_error: ‖W − Q(W)‖ / ‖W‖ of a layer, their mean.
        worst_error: the largest of them.
        bits_of: module path -> bits, of those layers that have others than ``bits``.
        symmetric, algorithm: as of :class:`Rounding`.
        kept: of float16, module paths whose weights stay float32: heads of labels.
        merged_first: a merged adapter's change is in the weights that were rounded. Else it is
            added to rounded weights, which stay floats in the layers that it changes.
        by_channel: those of ``layers`` whose codes, of :data:`CHANNEL_BITS`, have one scale for
            each output and no zero points.
    """

    bits: _Bits
    block_size: Annotated[int, between(1, 1 << 16)]
    layers: tuple[str, ...]
    mean_error: float = 0.0
    worst_error: float = 0.0
    bits_of: Mapping[str, _Bits] = field(default_factory=dict)
    symmetric: bool = False
    algorithm: Algorithm = "rtn"
    merged_first: bool = False
    by_channel: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def half(self) -> bool:
        """Weights are float16, not codes."""
        return self.bits == HALF_BITS

    def in_half(self, parameter: str, values: NDArray[np.floating]) -> NDArray[np.floating]:
        """A parameter of the checkpoint as a bundle in float16 has it, float32."""
        own = parameter.rpartition(".")[0] in self.kept
        return values if own else halved(values)

    def bits_at(self, path: str) -> int:
        """Bits of a layer's codes; 32 of a layer that is not rounded."""
        if path in self.by_channel:
            return CHANNEL_BITS
        return self.bits_of.get(path, self.bits) if path in self.layers else 32

    def blocks(self, path: str, weight: NDArray[np.floating]) -> Blocks:
        """The codes of a layer's weight ``[out, in]``, of an embedding's ``[vocab, hidden]``."""
        if path in self.by_channel:
            return quantize(weight, CHANNEL_BITS, weight.shape[1], symmetric=True)
        bits = self.bits_of.get(path, self.bits)
        return quantize(
            weight,
            bits,
            self.block_size,
            symmetric=self.symmetric,
            algorithm=self.algorithm,
        )

    def rounded(self, path: str, weight: NDArray[np.floating]) -> NDArray[np.float32]:
        """A weight, as :meth:`blocks` takes it, as the quantized layer has it, float32."""
        return self.blocks(path, weight).weight()


class Blocks(NamedTuple):
    """A quantized weight.

    Attributes:
        codes: ``[out, blocks, block_size]``, uint8; the last block is filled up with zero points.
        scales: ``[out, blocks]``, float32.
        zeros: ``[out, blocks]``, uint8; ``None``: the middle code.
        in_features: number of inputs.
        bits: of a code.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8] | None
    in_features: int
    bits: int

    @property
    def block_size(self) -> int:
        """Inputs of a block."""
        return int(self.codes.shape[-1])

    def weight(self) -> NDArray[np.float32]:
        """The weight that the codes mean, ``[out, in]``, float32."""
        middle = np.float32(2 ** (self.bits - 1))
        zeros = middle if self.zeros is None else self.zeros[..., None].astype(np.float32)
        values = self.codes.astype(np.float32)
        values -= zeros
        values *= self.scales[..., None]
        return values.reshape(len(values), -1)[:, : self.in_features]

    def rows(self, rows: NDArray[np.integer] | slice) -> Blocks:
        """The codes of some outputs."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return self._replace(codes=self.codes[rows], scales=self.scales[rows], zeros=zeros)

    def packed(self) -> dict[str, NDArray[np.generic]]:
        """Codes, scales and zero points as ``MatMulNBits`` reads them.

        Returns:
            ``codes [out, blocks, block_size * bits / 8]``, ``scales [out * blocks]`` and, if there
            are any, ``zeros [out * ceil(blocks * bits / 8)]``; of two codes of 4 bits the first is
            the lower half.
        """
        found: dict[str, NDArray[np.generic]] = {
            "codes": _halves(self.codes, self.bits),
            "scales": self.scales.reshape(-1),
        }
        if self.zeros is not None:
            found["zeros"] = _halves(self.zeros, self.bits).reshape(-1)
        return found

    def channels(self) -> dict[str, NDArray[np.generic]]:
        """Codes and scales of one symmetric block for each output, as ``DequantizeLinear`` reads
        them.

        Returns:
            ``codes [in, out]``, int8, around 0; ``scales [out]``.
        """
        codes = self.codes.reshape(len(self.codes), -1).astype(np.int16) - 2 ** (self.bits - 1)
        return {
            "codes": np.ascontiguousarray(codes.astype(np.int8).T),
            "scales": self.scales.reshape(-1),
        }


def quantize(
    weight: NDArray[np.floating],
    bits: int,
    block_size: int = BLOCK_SIZE,
    *,
    symmetric: bool = False,
    algorithm: Algorithm = "rtn",
) -> Blocks:
    """Round a weight to codes.

    Args:
        weight: ``[out, in]``.
        bits: 4 or 8.
        block_size: inputs of a block.
        symmetric, algorithm: as of :class:`Rounding`.
    """
    size_out, size_in = weight.shape
    count = -(-size_in // block_size)
    codes = np.empty((size_out, count, block_size), np.uint8)
    scales = np.empty((size_out, count), np.float32)
    zeros = None if symmetric else np.empty((size_out, count), np.uint8)
    step = max(1, _ROWS // max(size_in, 1))
    for first in range(0, size_out, step):
        some = slice(first, first + step)
        # However it lies in memory: sums of another order are other sums.
        rows = np.ascontiguousarray(weight[some], np.float32)
        padded = np.pad(rows, ((0, 0), (0, count * block_size - size_in)))
        blocks = padded.reshape(len(rows), count, block_size)
        if zeros is None:
            codes[some], scales[some] = _centred(blocks, bits)
        else:
            codes[some], scales[some], zeros[some] = _ALGORITHMS[algorithm](blocks, bits)
    return Blocks(codes, scales, zeros, size_in, bits)


_Rounded = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]


def _to_nearest(blocks: NDArray[np.float32], bits: int) -> _Rounded:
    """Each block's range, with zero in it, is spread evenly over the codes."""
    largest = 2**bits - 1
    low = np.minimum(blocks.min(axis=2), 0)
    high = np.maximum(blocks.max(axis=2), 0)
    scales = ((high - low) / np.float32(largest)).astype(np.float32)
    scales[scales == 0] = 1  # a block of zeros
    zeros = np.clip(np.rint(-low / scales), 0, largest)
    codes = np.clip(np.rint(blocks / scales[..., None]) + zeros[..., None], 0, largest)
    return codes.astype(np.uint8), scales, zeros.astype(np.uint8)


def _centred(
    blocks: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Zero is the middle code, and the value that is largest by size has the first code."""
    middle = 2 ** (bits - 1)
    places = np.abs(blocks).argmax(axis=2)[..., None]
    extremes = np.take_along_axis(blocks, places, axis=2)[..., 0]
    scales = (extremes / np.float32(-middle)).astype(np.float32)
    scales[scales == 0] = 1
    codes = np.clip(np.rint(blocks / scales[..., None]) + middle, 0, 2 * middle - 1)
    return codes.astype(np.uint8), scales


def _searched(blocks: NDArray[np.float32], bits: int) -> _Rounded:
    """llama.cpp's k-quant, as ONNX Runtime has it; where that is farther off, to the nearest.

    A block without both signs is farther off: its zero point would lie outside of the codes.
    """
    try:
        from onnxruntime.quantization.neural_compressor.weight_only import (
            quant_tensor_k_quant_cpu,
        )
    except ImportError as error:
        raise MissingDependencyError.of_export(error) from error
    plain = _to_nearest(blocks, bits)
    size_out, count, size = blocks.shape
    with np.errstate(divide="ignore", invalid="ignore"):
        found, steps, middles = quant_tensor_k_quant_cpu(blocks, bits, size)
    shape = (size_out, count)
    codes = np.nan_to_num(found).astype(np.uint8).reshape(blocks.shape)
    scales, zeros = steps.astype(np.float32).reshape(shape), middles.reshape(shape)

    def off(codes: NDArray[Any], scales: NDArray[Any], zeros: NDArray[Any]) -> NDArray[Any]:
        values = (codes.astype(np.float32) - zeros[..., None]) * scales[..., None]
        squares: NDArray[Any] = np.square(values - blocks, dtype=np.float64).sum(axis=2)
        return squares

    nearer = off(codes, scales, zeros) < off(*plain)  # NaN is not
    return (
        np.where(nearer[..., None], codes, plain[0]),
        np.where(nearer, scales, plain[1]),
        np.where(nearer, zeros, plain[2]).astype(np.uint8),
    )


_ALGORITHMS: Mapping[str, Callable[[NDArray[np.float32], int], _Rounded]] = {
    "rtn": _to_nearest,
    "k-quant": _searched,
}


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
    rounding: Rounding,
    paths: Sequence[str],
    vocabulary: Sequence[str],
    weights: Weights,
    layers: Mapping[str, _Layer],
) -> Quantization:
    """How these layers are quantized, with the errors of their weights.

    Args:
        rounding: how they are to be rounded.
        paths: module paths of the linear layers.
        vocabulary: module paths of the output layer and the token embedding, or of none.
        weights, layers: as :func:`rounded_weights` has them.
    """
    bits_of = {}
    if rounding.head_bits not in (None, rounding.bits):
        bits_of = dict.fromkeys(vocabulary, rounding.head_bits)
    plain = Quantization(
        rounding.bits,
        rounding.block_size,
        (*paths, *vocabulary),
        bits_of=bits_of,
        symmetric=rounding.symmetric,
        algorithm=rounding.algorithm,
        by_channel=tuple(paths) if rounding.per_channel else (),
    )
    return with_errors(plain, weights, layers)


def with_errors(
    quantization: Quantization, weights: Weights, layers: Mapping[str, _Layer]
) -> Quantization:
    """The same with the errors of the base's weights; arguments as of :func:`measured`."""
    after = rounded_weights(weights, quantization, layers)
    errors = []
    for parameter in (f"{path}.weight" for path in quantization.layers):
        weight, rounded = weights(parameter), after(parameter)
        if weight is None or rounded is None:
            continue  # a tied output layer's, which is the embedding's
        size = float(np.linalg.norm(weight))
        errors.append(float(np.linalg.norm(rounded - weight)) / size if size else 0.0)
    mean = sum(errors) / max(len(errors), 1)
    return dataclasses.replace(quantization, mean_error=mean, worst_error=max(errors, default=0.0))


def rounded_weights(
    weights: Weights, quantization: Quantization | None, layers: Mapping[str, _Layer]
) -> Weights:
    """A checkpoint's parameters as the rounded model has them.

    Args:
        weights: parameter path -> the checkpoint's value, ``None`` where it has none.
        quantization: ``None``: as they are.
        layers: module path -> layer, which says how the checkpoint keeps a linear weight.
    """
    if quantization is None:
        return weights
    if quantization.half:

        def in_half(parameter: str) -> NDArray[np.floating] | None:
            found = weights(parameter)
            return None if found is None else quantization.in_half(parameter, found)

        return in_half
    quantized = set(quantization.layers)

    def value(parameter: str) -> NDArray[np.floating] | None:
        found = weights(parameter)
        path, _, own = parameter.rpartition(".")
        if found is None or own != "weight" or path not in quantized:
            return found
        if layers[path].transposed:
            return quantization.rounded(path, found.T).T
        return quantization.rounded(path, found)

    return value
