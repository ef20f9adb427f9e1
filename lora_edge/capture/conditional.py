"""``lora_edge::Choose`` of a traced graph -> ``If``, each side's work inside its branch."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

_DOMAIN = "lora_edge"


def lower_choices(model: onnx.ModelProto) -> None:
    """Turn each ``Choose(few, many, index, limit)`` into an ``If`` on the size of ``index``.

    What only one side needs is moved into its branch, so that the other side costs nothing. Weights
    stay in the outer graph.

    Args:
        model: the graph; changed in place.
    """
    graph = model.graph
    readers: dict[str, set[int]] = {}
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    for index, node in enumerate(graph.node):
        for name in node.input:
            readers.setdefault(name, set()).add(index)
    kept = {value.name for value in graph.output}
    moved: set[int] = set()
    replacements: dict[int, list[onnx.NodeProto]] = {}
    for index, node in enumerate(graph.node):
        if node.domain == _DOMAIN:
            sides = [_exclusive(graph, side, index, makers, readers, kept) for side in (0, 1)]
            moved |= sides[0] | sides[1]
            replacements[index] = _if(graph, node, sides)
    nodes = [
        new
        for index, node in enumerate(graph.node)
        if index not in moved
        for new in replacements.get(index, [node])
    ]
    del graph.node[:]
    graph.node.extend(nodes)
    opsets = [opset for opset in model.opset_import if opset.domain != _DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(opsets)


def _exclusive(
    graph: onnx.GraphProto,
    side: int,
    choice: int,
    makers: dict[str, int],
    readers: dict[str, set[int]],
    kept: set[str],
) -> set[int]:
    """Indices of the nodes whose results reach only this side of a choice."""
    found: set[int] = set()
    maker = makers.get(graph.node[choice].input[side])
    # Nodes are in topological order, so going backwards meets every reader before the maker.
    for index in range(maker if maker is not None else -1, -1, -1):
        uses = {use for name in graph.node[index].output for use in readers.get(name, ())}
        final = index == maker and uses == {choice}
        inner = bool(uses) and uses <= found
        if (final or inner) and not kept & set(graph.node[index].output):
            found.add(index)
    return found


def _if(
    graph: onnx.GraphProto, choice: onnx.NodeProto, sides: list[set[int]]
) -> list[onnx.NodeProto]:
    name = choice.name or choice.output[0]
    limit = onnx.numpy_helper.from_array(np.array(choice.attribute[0].i, np.int64), f"{name}.limit")
    branches = []
    for side, indices in enumerate(sides):
        result = f"{name}.{('few', 'many')[side]}"
        nodes = [graph.node[index] for index in sorted(indices)]
        # A branch's output must be made in the branch.
        nodes.append(onnx.helper.make_node("Identity", [choice.input[side]], [result]))
        output = onnx.helper.make_tensor_value_info(result, onnx.TensorProto.FLOAT, None)
        branches.append(onnx.helper.make_graph(nodes, result, [], [output]))
    return [
        onnx.helper.make_node("Constant", [], [f"{name}.limit"], value=limit),
        onnx.helper.make_node("Size", [choice.input[2]], [f"{name}.size"], name=f"{name}.size"),
        onnx.helper.make_node(
            "LessOrEqual", [f"{name}.size", f"{name}.limit"], [f"{name}.is_few"], name=f"{name}.le"
        ),
        onnx.helper.make_node(
            "If",
            [f"{name}.is_few"],
            list(choice.output),
            name=name,
            then_branch=branches[0],
            else_branch=branches[1],
        ),
    ]
