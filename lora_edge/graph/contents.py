"""The constant tensors of a graph file, one by one, without the rest of the graph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_edge.graph.store import load


class Content(NamedTuple):
    """A constant of a graph.

    Attributes:
        name: of the initializer, or of the node that makes it.
        tensor: its values, read when they are asked for.
        place: data file, first byte and number of bytes; empty where the graph itself holds it.
    """

    name: str
    tensor: ir.TensorProtocol
    place: tuple[str, int, int] | tuple[()]

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(int(size) for size in self.tensor.shape.numpy())

    def values(self) -> NDArray[np.generic]:
        """The values, mapped from the data file where they are there."""
        found: NDArray[np.generic] = self.tensor.numpy()
        return found


def contents(path: Path) -> Iterator[Content]:
    """Every initializer and every constant made by a node, of the graph and its branches.

    Raises:
        GraphError: the file is no ONNX model.
    """
    model = load(path)
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield Content(name, value.const_value, _place(value.const_value))
        for node in graph:
            attribute = node.attributes.get("value") if node.op_type == "Constant" else None
            if attribute is not None and attribute.type == ir.AttributeType.TENSOR:
                name = node.outputs[0].name or node.name or ""
                yield Content(name, attribute.as_tensor(), ())


def _place(tensor: ir.TensorProtocol) -> tuple[str, int, int] | tuple[()]:
    if not isinstance(tensor, ir.ExternalTensor):
        return ()
    return (str(tensor.location), int(tensor.offset or 0), int(tensor.nbytes))
