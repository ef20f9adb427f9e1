"""A graph in which every dimension is a number, for providers that take no others.

Knows the portable form: inputs by the names of their dimensions, presents that are the past and the
new tokens, one behind the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from lora_edge.errors import GraphError
from lora_edge.names import FACTOR_PARTS, SELECT, is_past, parse_lora_input

_PAST_AXIS = 2


def fix_shapes(model: ir.Model, seq: int, past: int, rank: int) -> None:
    """Give every dimension a number: one row, ``seq`` new tokens behind ``past`` positions.

    A and B have this rank, a gate is ``[1, seq, 1]``, and what is stacked over adapters is of one.
    The presents become the new tokens' alone, ``[1, kv_heads, seq, head_dim]``. What follows
    from shapes alone is computed now.

    Args:
        model: a decoder in the portable form; changed in place, its weights are not touched.
        seq: tokens of one run.
        past: positions of the cache.
        rank: of every low-rank pair.

    Raises:
        GraphError: a dimension depends on values, or is none of the portable form's.
    """
    from onnxscript.optimizer import fold_constants  # few graphs need it

    graph = model.graph
    sizes = {
        "batch_size": 1,
        "sequence_length": seq,
        "past_sequence_length": past,
        "total_sequence_length": past + seq,
    }
    for value in graph.inputs:
        value.shape = ir.Shape(_fixed(value, seq, rank, sizes))
    for index, output in enumerate(graph.outputs):
        if str(output.name).startswith("present."):
            graph.outputs[index] = _new_alone(output)
    for value in _made(graph):
        value.shape = None
    fold_constants(model, onnx_shape_inference=True)  # node by node: what is folded tells shapes
    RemoveUnusedNodesPass()(model)
    ShapeInferencePass()(model)
    for value in _made(graph):
        if value.shape is None or not value.shape.is_static():
            node = value.producer()
            raise GraphError(
                f"{'a node' if node is None else node.op_type} gives {value.name} a shape that "
                f"depends on values, got {value.shape}",
                "This model has no graph with fixed shapes: export it without --static, and not "
                "for a target that takes fixed shapes only.",
            )


def _fixed(value: ir.Value, seq: int, rank: int, sizes: Mapping[str, int]) -> list[int]:
    """The numbers of an input's dimensions."""
    name, shape = str(value.name), list(value.shape or ())
    site = parse_lora_input(name)
    if name == SELECT:
        return [1] * len(shape)
    if site is not None and site.part == "gate":
        return [1, seq, 1]
    if site is not None:
        symbol = rank if site.part in FACTOR_PARTS else 1
        return [size if isinstance(size, int) else symbol for size in shape]
    found = []
    for size in shape:
        number = size if isinstance(size, int) else sizes.get(str(size.value))
        if number is None:
            raise GraphError(
                f"the input {name} has the dimension {size}, expected one of {', '.join(sizes)}",
                "Export with --form portable.",
            )
        found.append(number)
    return found


def _new_alone(present: ir.Value) -> ir.Value:
    """What is joined behind the past to make a present; it takes over the present's name."""
    joined = present.producer()
    parts = [] if joined is None or joined.op_type != "Concat" else list(joined.inputs)
    if len(parts) != 2 or parts[0] is None or parts[1] is None or not is_past(str(parts[0].name)):
        raise GraphError(
            f"{present.name} is not the past and the new tokens", "Export with --form portable."
        )
    new = parts[1]
    present.name, new.name = f"{present.name}.whole", present.name
    return new


def _made(graph: ir.Graph) -> Iterator[ir.Value]:
    """Everything that the nodes of a graph make."""
    for node in graph:
        yield from (value for value in node.outputs if value.name)
