"""Linear layers of few bits: ``MatMul`` with a constant -> ``com.microsoft.MatMulNBits``."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lora_edge.base.layer import Layer
from lora_edge.errors import GraphError
from lora_edge.graph.merge import WideArray, add_initializer, lazily
from lora_edge.graph.sites import Multiplication, multiplications
from lora_edge.maths.quantization import Activations, Blocks, Quantization, quantize

MATMUL_NBITS = "MatMulNBits"
_ACCURACY: Mapping[Activations, int] = {"fp32": 1, "int8": 4}


def quantizable(model: ir.Model, layers: Mapping[str, Layer]) -> tuple[str, ...]:
    """The linear layers that can be quantized: those with a MatMul and a weight of their own.

    Args:
        model: a graph of our own capture, whose nodes are named by module path.
        layers: module path -> layer.
    """
    return tuple(_own(model, layers))


def quantize_layers(
    model: ir.Model,
    layers: Mapping[str, Layer],
    paths: Collection[str],
    quantization: Quantization,
) -> None:
    """Put codes of few bits in the place of weights.

    Args:
        model: the graph; changed in place. Codes are in memory until it is saved.
        layers: module path -> layer.
        paths: of those, which to quantize; each is :func:`quantizable`.
        quantization: bits and size of a block.
    """
    found = _own(model, layers)
    for path in paths:
        weight = _matrix(found[path])
        blocks = quantize(weight, quantization.bits, quantization.block_size)
        _replace(model, path, found[path], blocks)
    RemoveUnusedNodesPass()(model)  # and the weights that nobody reads any more
    model.opset_imports.setdefault("com.microsoft", 1)


def round_layers(
    model: ir.Model,
    layers: Mapping[str, Layer],
    paths: Collection[str],
    quantization: Quantization,
) -> None:
    """Put rounded weights in the place of weights, which stay matrices of floats.

    Arguments as of :func:`quantize_layers`.
    """
    found = _own(model, layers)
    for path in paths:
        transposed = found[path].transposed

        def rounded(stored: WideArray, transposed: bool = transposed) -> WideArray:
            matrix = quantization.rounded(stored if transposed else stored.T)
            return (matrix if transposed else matrix.T).astype(np.float64)

        value = found[path].weight
        value.const_value = lazily(str(value.name), value, rounded)


def compute_in(model: ir.Model, activations: Activations) -> None:
    """Let the quantized layers multiply their codes with floats, or with codes of 8 bits.

    Args:
        model: the graph; changed in place.
        activations: ``fp32``; or ``int8``, to which ONNX Runtime rounds each block of activations.
    """
    for node in model.graph:
        if node.op_type == MATMUL_NBITS:
            level = _ACCURACY[activations]
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)


def _own(model: ir.Model, layers: Mapping[str, Layer]) -> dict[str, Multiplication]:
    found = {}
    for multiplication in multiplications(model):
        node, weight = multiplication.node, multiplication.weight
        layer = layers.get(node.name or "")
        if (
            layer is not None
            and layer.kind == "linear"
            and node.op_type == "MatMul"
            and (multiplication.in_features, multiplication.width)
            == (layer.in_features, layer.out_features)
            and len(weight.uses()) == 1
        ):
            found[str(node.name)] = multiplication
    return found


def _matrix(multiplication: Multiplication) -> NDArray[np.floating]:
    """The weight, ``[out, in]``."""
    tensor = multiplication.weight.const_value
    if tensor is None:
        raise GraphError(
            f"the weight {multiplication.weight.name} has no values", "Export the base again."
        )
    values: NDArray[np.floating] = tensor.numpy()
    return values if multiplication.transposed else values.T


def _replace(model: ir.Model, path: str, found: Multiplication, blocks: Blocks) -> None:
    old = found.node
    codes, scales, zeros = blocks.packed()
    inputs = [old.inputs[0]]
    for name, array in (("codes", codes), ("scales", scales), ("zeros", zeros)):
        inputs.append(add_initializer(model, f"{path}.weight.{name}", array))
    node = ir.node(
        MATMUL_NBITS,
        inputs,
        {
            "K": found.in_features,
            "N": found.width,
            "bits": blocks.bits,
            "block_size": blocks.codes.shape[-1],
            "accuracy_level": _ACCURACY["fp32"],
        },
        domain="com.microsoft",
        name=path,
    )
    y, result = old.outputs[0], node.outputs[0]
    name = y.name or path
    result.type, result.shape = y.type, y.shape
    model.graph.insert_before(old, node)
    for use in list(y.uses()):
        use.node.replace_input_with(use.idx, result)
    for index, output in enumerate(model.graph.outputs):
        if output is y:
            model.graph.outputs[index] = result
    model.graph.remove(old, safe=True)
    result.name = name
