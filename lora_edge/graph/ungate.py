"""Graphs whose branches have no gates: every row has the same adapter, or each its own."""

from __future__ import annotations

import onnx_ir as ir

from lora_edge.names import parse_lora_input


def ungate(model: ir.Model) -> None:
    """Take the gates out that are multiplied by, and their inputs; each is 1 from now on.

    A gate that the graph reads in another way, as at a convolution, stays an input.

    Args:
        model: a graph with branches; changed in place.
    """
    graph = model.graph
    for gate in list(graph.inputs):
        found = parse_lora_input(str(gate.name))
        uses = [use.node for use in gate.uses()]
        if found is None or found.part != "gate" or any(x.op_type != "Mul" for x in uses):
            continue
        for node in uses:
            (factor,) = [value for value in node.inputs if value is not gate]
            for use in list(node.outputs[0].uses()):
                use.node.replace_input_with(use.idx, factor)
            graph.remove(node, safe=True)
        graph.inputs.remove(gate)


def by_row(model: ir.Model) -> None:
    """Give A and B an axis of rows, so that each row of a batch is multiplied with its own.

    ``A [batch | 1, in, rank]``, ``B [batch | 1, rank, out]``.

    Args:
        model: a graph after :func:`ungate`, whose pairs all multiply ``[batch, seq, in]``; changed
            in place.
    """
    for value in model.graph.inputs:
        found = parse_lora_input(str(value.name))
        if found is not None and found.part in ("A", "B"):
            assert value.shape is not None
            value.shape = ir.Shape([f"{value.name}.rows", *value.shape])
