"""The nodes and inputs that one site gets, and how they take their place in a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from lora_edge.graph.sites import Site
from lora_edge.names import InputPart, lora_input

FLOAT = ir.TensorType(ir.DataType.FLOAT)


class SiteNodes:
    """The nodes that one site gets, in order, and the inputs that it makes on the way."""

    def __init__(self, graph: ir.Graph, site: Site, select: ir.Value | None) -> None:
        self.graph = graph
        self.site = site
        self.nodes: list[ir.Node] = []
        self._select = select

    def node(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        attributes: Mapping[str, object] | None = None,
    ) -> ir.Value:
        """Add a node; its output is called by the site, the name and nothing else."""
        node = ir.node(
            operator,
            inputs,
            attributes or {},
            name=f"lora.{self.site.path}.{name}",
        )
        node.outputs[0].name = f"{node.name}_out"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, name: str, values: Sequence[int]) -> ir.Value:
        """A small integer tensor."""
        full_name = f"lora.{self.site.path}.{name}"
        tensor = ir.tensor(np.array(values, np.int64), name=full_name)
        value = ir.Value(
            name=full_name,
            shape=ir.Shape([len(values)]),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def input(self, part: InputPart, shape: Sequence[int | str]) -> ir.Value:
        """Make one of the site's inputs; a string is a symbolic dimension of its own."""
        name = lora_input(self.site.path, part)
        return graph_input(
            self.graph, name, [x if isinstance(x, int) else f"{name}.{x}" for x in shape]
        )

    def pair(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        """A, B, whose rank is A's, and the gate."""
        site = self.site
        a = self.input("A", [site.in_features, "rank"])
        shape: list[int | str] = [f"{a.name}.rank", site.out_features]
        b = graph_input(self.graph, lora_input(site.path, "B"), shape)
        return a, b, self.input("gate", ["batch", "seq", "rank"])

    def selected(self, part: InputPart, size: int) -> ir.Value:
        """``select @ part``, ``[batch | 1, seq | 1, size]``."""
        stacked = self.input(part, ["S", size])
        return self.node("MatMul", [self._select, stacked], f"{part}.selected")

    def has(self, part: InputPart) -> bool:
        """Whether the site is to have an input."""
        return part in self.site.layer.parts


def graph_input(graph: ir.Graph, name: str, shape: Sequence[int | str]) -> ir.Value:
    """A new input of floats; a string is a symbolic dimension."""
    value = ir.Value(name=name, shape=ir.Shape(shape), type=FLOAT)
    graph.inputs.append(value)
    return value


def take_place(
    graph: ir.Graph, y: ir.Value, total: ir.Value, nodes: Sequence[ir.Node], anchor: ir.Node
) -> None:
    """Let everything that reads ``y`` read ``total`` instead, except the new nodes."""
    total.type = y.type
    own = set(map(id, nodes))
    for use in list(y.uses()):
        if id(use.node) not in own:
            use.node.replace_input_with(use.idx, total)
    for index, output in enumerate(graph.outputs):
        if output is y:
            graph.outputs[index] = total
    # The sum takes over the name, so that graph outputs and what people look for keep theirs.
    total.name, y.name = y.name, f"{y.name}.base"
    graph.insert_after(anchor, nodes)
