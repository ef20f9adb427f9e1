"""Low-rank branches in the gated form, one for each site.

::

    y = base(x) + ((x @ A) * gate) @ B        x [batch, seq, in]   A [in, R]   B [R, out]
                                              gate [batch | 1, seq | 1, R | 1]

A, B and the gate are graph inputs without defaults: a default would be silently kept by runtimes
that ignore overridable initializers, and forgetting the adapter would pass for the base. Each
symbolic dimension has a name that is used nowhere else, because ONNX Runtime shares buffers between
tensors whose dimensions have the same name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from lora_edge.errors import GraphError
from lora_edge.graph.sites import Site
from lora_edge.names import Part, lora_input

_FLOAT = ir.TensorType(ir.DataType.FLOAT)


def branch(model: ir.Model, sites: Mapping[str, Site]) -> None:
    """Add a switchable low-rank branch to each site.

    Sites that share a packed node must be given together and cover all of its columns.

    Args:
        model: the graph; changed in place. Its weights are not touched.
        sites: module path -> site.

    Raises:
        GraphError: the sites of a packed node leave some of its columns uncovered.
    """
    by_output: dict[int, list[Site]] = {}
    for site in sites.values():
        by_output.setdefault(id(site.y), []).append(site)
    for group in by_output.values():
        _branch_node(model.graph, sorted(group, key=lambda site: site.start))


def _branch_node(graph: ir.Graph, group: Sequence[Site]) -> None:
    y = group[0].y
    covered = 0
    for site in group:
        if site.start != covered:
            raise GraphError(
                f"columns {covered} to {site.start} of the packed node of {site.path} are no site",
                "Give all layers of the packed projection.",
            )
        covered += site.out_features
    if covered != group[0].width:
        raise GraphError(
            f"columns {covered} to {group[0].width} of the packed node of {group[-1].path} "
            "are no site",
            "Give all layers of the packed projection.",
        )
    anchor = y.producer()
    if anchor is None:
        raise GraphError(f"the output of {group[0].path} is a graph input", "Export it again.")
    nodes: list[ir.Node] = []
    deltas = [_delta(graph, site, nodes) for site in group]
    if len(deltas) > 1:
        nodes.append(ir.node("Concat", deltas, {"axis": -1}, name=f"lora.{group[0].path}.concat"))
        nodes[-1].outputs[0].name = f"lora.{group[0].path}.packed_delta"
        deltas = [nodes[-1].outputs[0]]
    add = ir.node("Add", [y, deltas[0]], name=f"lora.{group[0].path}.add")
    nodes.append(add)
    total = add.outputs[0]
    total.shape, total.type = y.shape, y.type
    for use in list(y.uses()):
        if use.node is not add:
            use.node.replace_input_with(use.idx, total)
    for index, output in enumerate(graph.outputs):
        if output is y:
            graph.outputs[index] = total
    # The sum takes over the name, so that graph outputs and what people look for keep theirs.
    total.name, y.name = y.name, f"{y.name}.base"
    graph.insert_after(anchor, nodes)


def _delta(graph: ir.Graph, site: Site, nodes: list[ir.Node]) -> ir.Value:
    path = site.path
    rank = f"{lora_input(path, 'A')}.rank"
    gate_shape = [f"{lora_input(path, 'gate')}.{dim}" for dim in ("batch", "seq", "rank")]
    a = _input(graph, path, "A", [site.in_features, rank])
    b = _input(graph, path, "B", [rank, site.out_features])
    gate = _input(graph, path, "gate", gate_shape)
    down = ir.node("MatMul", [site.x, a], name=f"lora.{path}.down")
    gated = ir.node("Mul", [down.outputs[0], gate], name=f"lora.{path}.gated")
    up = ir.node("MatMul", [gated.outputs[0], b], name=f"lora.{path}.up")
    for node in (down, gated, up):
        node.outputs[0].name = f"{node.name}_out"
        nodes.append(node)
    return up.outputs[0]


def _input(graph: ir.Graph, path: str, part: Part, shape: Sequence[int | str]) -> ir.Value:
    value = ir.Value(name=lora_input(path, part), shape=ir.Shape(shape), type=_FLOAT)
    graph.inputs.append(value)
    return value
