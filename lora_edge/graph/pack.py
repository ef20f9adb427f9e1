"""Layers of few bits that read the same activations, in one node.

::

    q+k+v = MatMulNBits(x)        x [batch, seq, in]    q+k+v [batch, seq, out_q + out_k + out_v]
    q, k, v = Split(q+k+v)

The activations are rounded once, and one node has the work of several. What reads q, k or v goes on
reading it, so that branches are added as if nothing had been packed. Each row of the codes is what
it was: the sums of a row do not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_all_uses_with
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lora_edge.graph.merge import add_initializer
from lora_edge.graph.multiplications import MATMUL_NBITS
from lora_edge.names import packed_name

_ATTENTION = "GroupQueryAttention"


def pack(model: ir.Model) -> None:
    """Let layers of few bits that read the same value be one node, whose output is split.

    Args:
        model: a graph whose nodes of few bits are named by module path; changed in place. Packed
            codes are put together when they are read.
    """
    groups: dict[tuple[object, ...], list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type == MATMUL_NBITS and all(len(x.uses()) == 1 for x in _codes(node)):
            same = (str(node.attributes[x]) for x in ("K", "bits", "block_size", "accuracy_level"))
            x = node.inputs[0]
            # What an encoder gives is read by all layers of a decoder, and each makes its own.
            every = x is not None and x.is_graph_input()
            module = str(node.name).rpartition(".")[0] if every else ""
            key = (id(x), len(node.inputs), module, *same)
            groups.setdefault(key, []).append(node)
    for group in groups.values():
        if len(group) > 1:
            _pack(model, group)
    RemoveUnusedNodesPass()(model)


def unsplit_attention(model: ir.Model) -> None:
    """Let an attention read q, k and v as the packed node gives them, where nobody else reads them.

    Args:
        model: a graph after :func:`pack`; changed in place.
    """
    for node in model.graph:
        if node.op_type != _ATTENTION:
            continue
        split = node.inputs[0].producer() if node.inputs[0] is not None else None
        if split is None or split.op_type != "Split":
            continue
        outputs = split.outputs
        if tuple(node.inputs[:3]) != tuple(outputs) or any(len(x.uses()) != 1 for x in outputs):
            continue
        node.replace_input_with(0, split.inputs[0])
        node.replace_input_with(1, None)
        node.replace_input_with(2, None)
    RemoveUnusedNodesPass()(model)


def _codes(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs[1:] if value is not None]


def _pack(model: ir.Model, group: Sequence[ir.Node]) -> None:
    first, name = group[0], packed_name([str(node.name) for node in group])
    x = first.inputs[0]
    inputs = [x]
    for values in zip(*map(_codes, group), strict=True):
        part = str(values[0].name).rpartition(".")[2]
        inputs.append(_side_by_side(model, f"{name}.weight.{part}", values))
    sizes = [node.attributes["N"].as_int() for node in group]
    attributes = {**first.attributes, "N": ir.AttrInt64("N", sum(sizes))}
    node = ir.node(MATMUL_NBITS, inputs, domain="com.microsoft", name=name)
    node.attributes.update(attributes)
    node.outputs[0].name = f"{name}.packed"
    node.outputs[0].type = first.outputs[0].type
    lengths = add_initializer(model, f"{name}.sizes", np.array(sizes, np.int64))
    split = ir.node(
        "Split",
        [node.outputs[0], lengths],
        {"axis": -1},
        num_outputs=len(group),
        name=f"{name}.split",
    )
    model.graph.insert_before(first, [node, split])
    for old, new in zip(group, split.outputs, strict=True):
        value = old.outputs[0]
        new.type, new.shape, called = value.type, value.shape, value.name
        replace_all_uses_with(value, new, replace_graph_outputs=True)
        model.graph.remove(old, safe=True)
        value.name, new.name = None, called


def _side_by_side(model: ir.Model, name: str, values: Sequence[ir.Value]) -> ir.Value:
    """Arrays of several layers one after another, along the first axis."""
    tensors = [value.const_value for value in values]
    assert all(tensor is not None for tensor in tensors)
    shapes = [tuple(int(n) for n in tensor.shape.numpy()) for tensor in tensors]  # type: ignore[union-attr]
    shape = ir.Shape([sum(x[0] for x in shapes), *shapes[0][1:]])
    dtype = tensors[0].dtype  # type: ignore[union-attr]

    def compute() -> ir.TensorProtocol:
        return ir.Tensor(np.concatenate([x.numpy() for x in tensors]), name=name)  # type: ignore[union-attr]

    tensor = ir.LazyTensor(compute, dtype=dtype, shape=shape, name=name, cache=False)
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value
