"""A copy of a graph in float32 that gives the largest number of each value that float16 will hold.

The copy is in memory and holds no weights: those in an external data file stay there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from lora_edge.graph.half import half_values
from lora_edge.graph.store import load

RANGES = "lora_edge.ranges"


@dataclass(frozen=True)
class RangedGraph:
    """A graph whose one output more is ``[values] float32``, the largest sizes.

    Attributes:
        model: the serialized ONNX model, external tensors by reference.
        folder: where the external data is.
        values: of each value what makes it, in the order of the output.
    """

    model: bytes
    folder: Path
    values: tuple[str, ...]


def ranged(path: str | os.PathLike[str]) -> RangedGraph:
    """Give a copy of a graph the output :data:`RANGES`.

    Args:
        path: a graph after :func:`~lora_edge.graph.half.store_half`.

    Raises:
        GraphError: the file is missing or is not an ONNX model.
    """
    model = load(path)
    graph, values = model.graph, half_values(model)
    shape = ir.Value(
        name=f"{RANGES}.shape",
        shape=ir.Shape([1]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor([1], dtype=ir.DataType.INT64, name=f"{RANGES}.shape"),
    )
    graph.register_initializer(shape)
    found = []
    for index, value in enumerate(values):
        size = ir.node("Abs", [value], name=f"{RANGES}.{index}.size")
        largest = ir.node(
            "ReduceMax", size.outputs, {"keepdims": 0}, name=f"{RANGES}.{index}.largest"
        )
        one = ir.node("Reshape", [largest.outputs[0], shape], name=f"{RANGES}.{index}")
        for node in (size, largest, one):
            node.outputs[0].name = f"{node.name}_out"
            graph.append(node)
        found.append(one.outputs[0])
    together = ir.node("Concat", found, {"axis": 0}, name=RANGES)
    made = together.outputs[0]
    made.name, made.type = RANGES, ir.TensorType(ir.DataType.FLOAT)
    graph.append(together)
    graph.outputs.append(made)
    names = tuple(_named(value) for value in values)
    return RangedGraph(ir.to_proto(model).SerializeToString(), Path(path).parent, names)


def _named(value: ir.Value) -> str:
    """What makes a value: a layer's path, or the exporter's name of an operator."""
    node = value.producer()
    return str(value.name if node is None else node.name or value.name).strip("/")
