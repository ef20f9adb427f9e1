"""Layers of 8 bits with one scale for each output: ``com.microsoft.DynamicQuantizeMatMul``.

::

    W = Cast(codes [in, out] int8) * scales [out]      computed in floats
    y = MatMul(x, W)

    y = DynamicQuantizeMatMul(x, codes, scales)        with activations of int8

In floats there is no DequantizeLinear: of one before a MatMul, ONNX Runtime makes a MatMulNBits
that rounds activations, without being asked (``session.qdq_matmulnbits_accuracy_level``). The
operator rounds a whole activation tensor to 8 bits, with one scale, and multiplies codes with
codes. The codes have 7 bits: on processors without instructions for products of 8 bits (VNNI), sums
of two products with 8 saturate, without a word.
Source: ONNX Runtime, ContribOperators.md, and its documentation of ``reduce_range``.
"""

from __future__ import annotations

import onnx_ir as ir

from lora_edge.graph.merge import add_initializer, take_place
from lora_edge.graph.multiplications import DYNAMIC_MATMUL, Multiplication, codes_behind
from lora_edge.maths.quantization import Blocks


def put_channels(model: ir.Model, path: str, found: Multiplication, blocks: Blocks) -> None:
    """Let a MatMul read codes that are floats again.

    Args:
        model: the graph; changed in place.
        path: module path of the layer.
        found: the MatMul with its constant.
        blocks: the codes ``[out, 1, in]``, one block for each output, symmetric.
    """
    arrays = blocks.channels().items()
    values = [add_initializer(model, f"{path}.weight.{x}", array) for x, array in arrays]
    node = found.node
    node.replace_input_with(1, _in_floats(model, node, path, *values))


def channels_in(model: ir.Model, *, floats: bool) -> None:
    """Let these layers multiply with floats, or with codes of 8 bits.

    Args:
        model: the graph; changed in place.
        floats: or else codes.
    """
    for node in list(model.graph):
        if floats and node.op_type == DYNAMIC_MATMUL:
            values = _in_floats(model, node, str(node.name), *node.inputs[1:3])
            take_place(model, node, ir.node("MatMul", [node.inputs[0], values], name=node.name))
        elif not floats and node.op_type == "MatMul":
            weight = node.inputs[1]
            codes = None if weight is None else codes_behind(weight)
            if weight is None or codes is None:
                continue
            product = weight.producer()
            assert product is not None
            assert product.inputs[0] is not None
            cast = product.inputs[0].producer()
            assert cast is not None
            inputs = [node.inputs[0], codes, product.inputs[1]]
            new = ir.node(DYNAMIC_MATMUL, inputs, domain="com.microsoft", name=node.name)
            take_place(model, node, new)
            model.graph.remove([product, cast], safe=True)
    model.opset_imports.setdefault("com.microsoft", 1)


def _in_floats(
    model: ir.Model, before: ir.Node, path: str, codes: ir.Value | None, scales: ir.Value | None
) -> ir.Value:
    cast = ir.node("Cast", [codes], {"to": ir.DataType.FLOAT}, name=f"{path}.weight.codes")
    product = ir.node("Mul", [cast.outputs[0], scales], name=f"{path}.weight")
    cast.outputs[0].name, product.outputs[0].name = f"{path}.weight.whole", f"{path}.weight.values"
    model.graph.insert_before(before, [cast, product])
    return product.outputs[0]
