"""The nodes of a graph that multiply activations with a constant matrix, in any form of weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import onnx_ir as ir

from lora_edge.names import packed_paths

MATMUL_NBITS = "MatMulNBits"
DYNAMIC_MATMUL = "DynamicQuantizeMatMul"


class Multiplication(NamedTuple):
    """A node that multiplies an activation with a constant matrix, or one layer's part of it.

    Attributes:
        name: the node's, or of a packed node the layer's module path.
    """

    name: str
    node: ir.Node
    y: ir.Value
    weight: ir.Value
    transposed: bool
    in_features: int
    width: int


def multiplications(model: ir.Model) -> Iterable[Multiplication]:
    """The nodes whose second input is a constant matrix, and whose output takes a branch."""
    for node in model.graph:
        if node.op_type == MATMUL_NBITS:
            yield from _quantized(node)
            continue
        if node.op_type not in ("MatMul", "Gemm", DYNAMIC_MATMUL) or len(node.inputs) < 2:
            continue
        x, matrix = node.inputs[0], node.inputs[1]
        if x is None or matrix is None:
            continue
        transposed = False
        producer = matrix.producer()
        if producer is not None and producer.op_type == "Transpose":
            source = producer.inputs[0]
            if source is None:
                continue
            matrix, transposed = source, True
        elif (codes := codes_behind(matrix)) is not None:
            matrix = codes
        if not matrix.is_initializer() or matrix.shape is None or len(matrix.shape) != 2:
            continue
        y = node.outputs[0]
        if node.op_type == "Gemm":
            if not _is_plain(node):
                continue
            transposed ^= bool(_int_attribute(node, "transB", 0))
            if (unflattened := _unflattened_output(x, y)) is None:
                continue
            y = unflattened
        rows, columns = (int(dim) for dim in matrix.shape.numpy())
        in_features, width = (columns, rows) if transposed else (rows, columns)
        yield Multiplication(str(node.name or ""), node, y, matrix, transposed, in_features, width)


def codes_behind(matrix: ir.Value) -> ir.Value | None:
    """The codes of ``Cast(codes) * scales``; ``None``: the value is something else."""
    product = matrix.producer()
    cast = None
    if product is not None and product.op_type == "Mul" and product.inputs[0] is not None:
        cast = product.inputs[0].producer()
    if cast is None or cast.op_type != "Cast":
        return None
    codes = cast.inputs[0]
    return codes if codes is not None and codes.is_initializer() else None


def _quantized(node: ir.Node) -> Iterable[Multiplication]:
    """A weight of few bits, or several that are packed: its codes, ``[out, blocks, bytes]``."""
    codes, y = node.inputs[1], node.outputs[0]
    assert codes is not None
    in_features, width = (_int_attribute(node, name, 0) for name in ("K", "N"))
    paths = packed_paths(str(node.name or ""))
    if len(paths) == 1:
        yield Multiplication(paths[0], node, y, codes, True, in_features, width)
        return
    uses = tuple(y.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Split":
        return  # an attention reads all of them at once
    split = uses[0].node
    assert split.inputs[1] is not None
    assert split.inputs[1].const_value is not None
    sizes = split.inputs[1].const_value.numpy()
    for path, part, size in zip(paths, split.outputs, sizes, strict=True):
        yield Multiplication(path, node, part, codes, True, in_features, int(size))


def _is_plain(node: ir.Node) -> bool:
    alpha, beta = node.attributes.get("alpha"), node.attributes.get("beta")
    return (
        (alpha is None or alpha.as_float() == 1.0)
        and (beta is None or beta.as_float() == 1.0)
        and not _int_attribute(node, "transA", 0)
    )


def _int_attribute(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _unflattened_output(x: ir.Value, y: ir.Value) -> ir.Value | None:
    """The 3-D value that the output of a Gemm on ``[batch * seq, in]`` is reshaped to.

    A gate ``[batch, 1, R]`` against a 2-D activation would broadcast silently to three dimensions,
    so the branch goes around the flattening.
    """
    before = x.producer()
    uses = tuple(y.uses())
    if before is None or before.op_type != "Reshape" or len(uses) != 1:
        return None
    after = uses[0].node
    return after.outputs[0] if after.op_type == "Reshape" else None
