"""Which values of a graph are floats, and which nodes stay in float32 when it goes into float16.

These must not overflow or lose their digits: the statistics of norms, softmax and the scores that
it reads, masks, and what follows from positions alone, such as the rotary's tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16

# Operators whose outputs are no floats, and those whose output is what a later input is.
_TO_OTHER = frozenset(
    {"Shape", "Size", "NonZero", "ArgMax", "ArgMin", "And", "Equal", "Greater", "GreaterOrEqual"}
    | {"IsInf", "IsNaN", "Less", "LessOrEqual", "Not", "Or", "Xor"}
)
_LIKE_INPUT = {"Where": 1, "OneHot": 2}

_WIDE = frozenset({"Softmax", "LogSoftmax", "ReduceMean", "ReduceSumSquare", "ReduceL2", "Cos"}) | {
    "Sin", "Range", "CumSum", "BatchNormalization", "InstanceNormalization", "ConstantOfShape",
}  # fmt: skip
_STATISTICS = frozenset({"ReduceMean", "ReduceSumSquare", "ReduceL2"})
ELEMENTWISE = frozenset(
    {"Abs", "Add", "Cast", "Clip", "Div", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "Sqrt"}
    | {"Sub", "Where", "Identity"}
)


def float_values(model: ir.Model) -> set[ir.Value]:
    """The values that are float32 (or, of stored weights, become it), by rules of the operators.

    No shape inference goes through ``com.microsoft`` operators.
    """
    found = {
        value
        for graph in model.graphs()
        for value in (*graph.inputs, *graph.initializers.values())
        if value.dtype in (FLOAT, HALF)
    }
    for node in _in_order(model.graph):
        if _gives_floats(node, found):
            found.update(node.outputs[:1] if node.op_type == "TopK" else node.outputs)
    return found


def wide_nodes(model: ir.Model, floats: set[ir.Value]) -> set[ir.Node]:
    """The nodes that go on computing in float32."""
    nodes = [node for node in model.graph if node.op_type != "Constant"]
    weights = {x for x in model.graph.initializers.values() if x.dtype == HALF}
    active: set[ir.Value] = {*weights, *(x for x in model.graph.inputs if x in floats)}
    statistics: set[ir.Value] = set()
    wide: set[ir.Node] = set()
    for node in nodes:
        inputs = [value for value in node.inputs if value in floats]
        if any(value in active for value in _read(node)):
            active.update(value for value in node.outputs if value in floats)
        elif any(value in floats for value in (*inputs, *node.outputs)):
            wide.add(node)  # follows from positions and constants alone
            continue
        own = [value for value in inputs if value is not None and constant(value) is None]
        of_statistics = bool(own) and any(value in statistics for value in own)
        if node.op_type in _WIDE or of_statistics or node.op_type == "If":
            wide.add(node)
        if node.op_type in _STATISTICS or (
            of_statistics and all(value in statistics for value in own)
        ):
            statistics.update(node.outputs)
        if node.op_type == "Cast" and inputs and node.outputs[0] not in floats:
            wide.add(node)
    kept = set(model.graph.outputs)
    for node in reversed(nodes):
        if node.op_type in ELEMENTWISE and node not in wide:
            uses = [use for value in node.outputs for use in value.uses()]
            if uses and not kept & set(node.outputs) and all(use.node in wide for use in uses):
                wide.add(node)
    return wide


def _in_order(graph: ir.Graph) -> Iterator[ir.Node]:
    """All nodes, those of a node's branches before it."""
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _in_order(attribute.as_graph())
        yield node


def _gives_floats(node: ir.Node, floats: set[ir.Value]) -> bool:
    if node.op_type in _TO_OTHER:
        return False
    if node.op_type == "Cast":
        return node.attributes["to"].as_int() == FLOAT
    if node.op_type in ("Constant", "ConstantOfShape"):
        return _constant_dtype(node) == FLOAT
    if node.op_type == "If":
        return any(x in floats for x in node.attributes["then_branch"].as_graph().outputs)
    index = _LIKE_INPUT.get(node.op_type, 0)
    value = node.inputs[index] if index < len(node.inputs) else None
    return value in floats if value is not None else False


def _constant_dtype(node: ir.Node) -> ir.DataType | None:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.TENSOR:
            return attribute.as_tensor().dtype
        if attribute.name in ("value_float", "value_floats"):
            return FLOAT
    return FLOAT if node.op_type == "ConstantOfShape" else None


def _read(node: ir.Node) -> Iterable[ir.Value]:
    """What a node reads, its branches' nodes included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from _read(inner)


def constant(value: ir.Value) -> ir.TensorProtocol | None:
    return ir.convenience.get_const_tensor(value)
