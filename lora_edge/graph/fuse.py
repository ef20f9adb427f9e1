"""Small fusions on a graph that was just traced in the fused form.

Needs only the graph's structure; the weights' bytes are never read. Ensures that no operator is
left that ``onnx.checker`` does not know: ``SimplifiedLayerNormalization`` is in the standard domain
of ONNX Runtime alone, so what is not joined with a residual is written out, in the very pattern
that ONNX Runtime joins again when it loads the graph.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

_NORM = "SimplifiedLayerNormalization"
_MICROSOFT = "com.microsoft"
_WITH_HEADS = 4  # dimensions of queries and keys; nothing has more
_ELEMENTWISE = frozenset({"Add", "Div", "Mul", "Sub"})
_LIKE_FIRST = frozenset(
    {
        _NORM, "Cast", "Erf", "GroupQueryAttention", "LayerNormalization", "Pow", "Relu", "Sigmoid",
        "Slice", "Split", "Tanh", "Transpose",
    }
)  # fmt: skip


def fuse(model: ir.Model) -> None:
    """Undo views, join residual sums with the norms that follow them, write out the other norms.

    Args:
        model: a graph of our own capture, before any branch; changed in place.
    """
    graph = model.graph
    _undo_views(graph)
    ranks = _ranks(graph)
    for node in list(graph):
        if node.op_type == _NORM and not _join_residual(graph, node, ranks):
            _write_out(graph, node)


def _undo_views(graph: ir.Graph) -> None:
    """Drop pairs of Reshape that split the last axis into heads and join it again."""
    ranks = _ranks(graph)
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        inner = None if source is None else source.producer()
        if inner is None or _view(node) != (0, 0, -1) or node.outputs[0] in graph.outputs:
            continue
        shape = _view(inner)
        original = inner.inputs[0] if inner.inputs else None
        if shape is None or shape[:2] != (0, 0) or original is None:
            continue
        if ranks.get(original) == 3:
            ir.convenience.replace_all_uses_with(node.outputs[0], original)
            _remove_unused(graph, [node, inner])


def _ranks(graph: ir.Graph) -> dict[ir.Value, int]:
    """Rank of each value, where it follows from the inputs' by simple rules.

    The exporter infers nothing behind an operator that it does not know.
    """
    ranks = {value: len(value.shape) for value in graph.inputs if value.shape is not None}

    def rank(value: ir.Value | None) -> int | None:
        if value is None:
            return None
        if value.shape is not None:
            return len(value.shape)
        constant = ir.convenience.get_const_tensor(value)
        return ranks.get(value) if constant is None else len(constant.shape)

    for node in graph:
        view = _view(node)
        inputs = [rank(value) for value in node.inputs]
        if view is not None:
            found: int | None = len(view)
        elif node.op_type == "MatMul" and inputs[1] == 2:
            found = inputs[0]
        elif node.op_type == "Gather" and inputs[0] == 2 and inputs[1] is not None:
            found = inputs[1] + 1
        elif node.op_type in _ELEMENTWISE:
            most = max((x for x in inputs if x is not None), default=0)
            found = None if None in inputs and most < _WITH_HEADS else most
        elif node.op_type in _LIKE_FIRST:
            found = inputs[0]
        else:
            found = rank(node.outputs[0])
        if found is not None:
            outputs = node.outputs if node.op_type == "Split" else node.outputs[:1]
            ranks.update(dict.fromkeys(outputs, found))
    return ranks


def _remove_unused(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    """Remove each node that nobody reads any more, and its constants."""
    for node in nodes:
        if any(value.uses() or value in graph.outputs for value in node.outputs):
            continue
        sources = [value.producer() for value in node.inputs if value is not None]
        graph.remove(node, safe=True)
        _remove_unused(graph, [x for x in sources if x is not None and x.op_type == "Constant"])


def _view(node: ir.Node) -> tuple[int, ...] | None:
    """The constant shape of a Reshape."""
    if node.op_type != "Reshape" or node.inputs[1] is None:
        return None
    tensor = ir.convenience.get_const_tensor(node.inputs[1])
    return None if tensor is None else tuple(int(size) for size in tensor.numpy())


def _join_residual(graph: ir.Graph, norm: ir.Node, ranks: Mapping[ir.Value, int]) -> bool:
    """``Add`` and norm -> ``SkipSimplifiedLayerNormalization``, whose fourth output is the sum.

    Not where heads have an axis of their own (a norm behind the rotary), which it does not take.
    """
    total, weight = norm.inputs[0], norm.inputs[1]
    add = None if total is None else total.producer()
    if add is None or total is None or add.op_type != "Add" or total in graph.outputs:
        return False
    left, right = add.inputs
    if ranks.get(total) == _WITH_HEADS:
        return False
    if left is None or right is None or left.is_initializer() or right.is_initializer():
        return False
    order = {node: index for index, node in enumerate(graph)}
    if any(order[use.node] < order[norm] for use in total.uses() if use.node in order):
        return False  # somebody needs the sum before the norm is computed
    joined = ir.node(
        "SkipSimplifiedLayerNormalization",
        [left, right, weight],
        {"epsilon": norm.attributes["epsilon"].as_float()},
        domain=_MICROSOFT,
        num_outputs=4,
        name=f"{norm.name}.skip",
    )
    normalized, mean, inverse, new_total = joined.outputs
    mean.name = inverse.name = ""
    names = norm.outputs[0].name, total.name
    graph.insert_before(norm, joined)
    for old, new in ((norm.outputs[0], normalized), (total, new_total)):
        new.shape, new.type = old.shape, old.type
        ir.convenience.replace_all_uses_with(old, new)
    graph.remove([norm, add], safe=True)
    normalized.name, new_total.name = names
    return True


def _write_out(graph: ir.Graph, norm: ir.Node) -> None:
    """``x / sqrt(mean(x ** 2) + eps) * weight`` by standard operators."""
    x, weight = norm.inputs[0], norm.inputs[1]
    two = _constant(graph, "two", np.array(2.0, np.float32))
    eps = norm.attributes["epsilon"].as_float()
    epsilon = _constant(graph, f"epsilon_{eps:g}", np.array(eps, np.float32))
    last = _constant(graph, "last_axis", np.array([-1], np.int64))
    nodes: list[ir.Node] = []

    def add(operator: str, *inputs: ir.Value | None) -> ir.Value:
        node = ir.node(operator, list(inputs), name=f"{norm.name}.{operator.lower()}{len(nodes)}")
        node.outputs[0].name = f"{node.name}_out"
        nodes.append(node)
        return node.outputs[0]

    root = add("Sqrt", add("Add", add("ReduceMean", add("Pow", x, two), last), epsilon))
    result = add("Mul", add("Div", x, root), weight)
    old = norm.outputs[0]
    name = old.name
    result.shape, result.type = old.shape, old.type
    graph.insert_before(norm, nodes)
    ir.convenience.replace_all_uses_with(old, result)
    graph.remove(norm, safe=True)
    result.name = name


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    full_name = f"lora_edge.{name}"
    if full_name in graph.initializers:
        return graph.initializers[full_name]
    tensor = ir.tensor(array, name=full_name)
    value = ir.Value(
        name=full_name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value
