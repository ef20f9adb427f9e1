"""A copy of a graph that gives the output of every layer, besides what it gives anyway.

The copy is in memory and holds no weights: tensors in an external data file stay there, and the
session that opens it is told their folder. Layers are found by node names, so all of a graph of our
own capture; of a foreign one, the layers that have a branch and those whose nodes are named by
their path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from lora_edge.graph.multiplications import multiplications
from lora_edge.graph.sites import NORMS, effective_weight
from lora_edge.graph.store import load
from lora_edge.names import lora_input

# The last node of a site's branch (see branch.py); its output is the layer's.
_AFTER_BRANCH = re.compile(r"lora\.(?P<path>.+)\.(?:add|total|shifted|scaled)")
_PACKED = re.compile(r"lora\.(?P<path>.+)\.packed")
_DELTA = re.compile(r"lora\.(?P<path>.+)\.(?:up|sum\d+)")


@dataclass(frozen=True)
class Tap:
    """Where the output of a layer is.

    Attributes:
        value: the graph output, ``[batch, seq, >= width]`` (a convolution's ``[batch, out, …]``).
        start: first column of the layer's own.
        width: number of its columns; ``None``: all that there are.
    """

    value: str
    start: int = 0
    width: int | None = None


@dataclass(frozen=True)
class TappedGraph:
    """A graph with more outputs.

    Attributes:
        model: the serialized ONNX model, external tensors by reference.
        folder: where the external data is.
        layers: module path -> its output, in the order of execution.
    """

    model: bytes
    folder: Path
    layers: dict[str, Tap]


def tap(path: str | os.PathLike[str]) -> TappedGraph:
    """Make the output of every layer that can be told in a graph an output of a copy of it.

    A layer's output is what its module returns in PyTorch: with its bias, and with its branch.

    Raises:
        GraphError: the file is missing or is not an ONNX model.
    """
    model = load(path)
    order = {node: index for index, node in enumerate(model.graph)}
    found: dict[str, tuple[int, ir.Value, Tap]] = {}
    for layer, value, start, width in _layers(model):
        producer = value.producer()
        if producer is not None and producer in order and value.name:
            found[layer] = order[producer], value, Tap(value.name, start, width)
    ordered = sorted(found.items(), key=lambda item: item[1][0])
    known = {value.name for value in model.graph.outputs}
    for _, (_, value, _) in ordered:
        if value.name not in known:
            known.add(value.name)
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
            # What the exporter inferred may not hold at run time, and nothing needs it.
            value.shape = None
            model.graph.outputs.append(value)
    layers = {layer: where for layer, (_, _, where) in ordered}
    return TappedGraph(ir.to_proto(model).SerializeToString(), Path(path).parent, layers)


def _layers(model: ir.Model) -> Iterator[tuple[str, ir.Value, int, int | None]]:
    """Module path, output, first column, columns; of a layer found twice the last one holds."""
    for stored, weight in model.graph.initializers.items():
        name = stored.removesuffix(".codes")
        if name.endswith(".weight"):
            path = name.removesuffix(".weight")
            yield from ((path, value, 0, None) for value in _read_by_one(weight))
    for multiplication in multiplications(model):
        path = _path_of(multiplication.name)
        if path:
            yield path, _with_bias(multiplication.y), 0, None
    for node in model.graph:
        name = node.name or ""
        if node.op_type == "Conv" and _path_of(name):
            yield _path_of(name), node.outputs[0], 0, None
        packed = _PACKED.fullmatch(name)
        branch = _AFTER_BRANCH.fullmatch(name)
        if packed is not None:
            yield from _packed(model, node)
        elif branch is not None and not _is_packed(node):
            value = node.outputs[0]
            if not _scaled_after(value, node):
                yield branch["path"], _with_bias(value), 0, None


def _read_by_one(weight: ir.Value) -> Iterator[ir.Value]:
    """The output of the only embedding or norm that reads a weight."""
    readers = [use.node for use in effective_weight(weight).uses()]
    nodes = [
        node
        for node in readers
        if node.op_type in ("Gather", "GatherBlockQuantized", "Mul", *NORMS)
    ]
    value = nodes[0].outputs[0] if len(nodes) == 1 else None
    if value is None or _scaled_after(value, nodes[0]):
        return
    if not any(_AFTER_BRANCH.fullmatch(use.node.name or "") for use in value.uses()):
        yield value


def _scaled_after(value: ir.Value, node: ir.Node) -> bool:
    """Whether an embedding is multiplied with a constant.

    That is the module's own part in some models (Gemma) and the model's in others (Granite), so
    that its output is not known.
    """
    source = node.inputs[0]
    while node.op_type == "Add" and source is not None and source.producer() is not None:
        node = source.producer()  # type: ignore[assignment]
        source = node.inputs[0]
    if node.op_type not in ("Gather", "GatherBlockQuantized"):
        return False
    return any(
        use.node.op_type in ("Mul", "Div") and _is_constant(use.node.inputs[1 - use.idx])
        for use in value.uses()
    )


def _is_constant(value: ir.Value | None) -> bool:
    while value is not None and not value.is_initializer():
        producer = value.producer()
        if producer is None or producer.op_type not in ("Cast", "Constant"):
            return False
        if producer.op_type == "Constant":
            return True
        value = producer.inputs[0]
    return value is not None


def _with_bias(value: ir.Value) -> ir.Value:
    """The value after the addition of a constant vector, if that is all that happens to it."""
    uses = tuple(value.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add":
        return value
    other = uses[0].node.inputs[1 - uses[0].idx]
    is_vector = other is not None and other.is_initializer() and other.shape is not None
    return uses[0].node.outputs[0] if is_vector and len(other.shape) == 1 else value  # type: ignore[union-attr,arg-type]


def _is_packed(node: ir.Node) -> bool:
    delta = node.inputs[1] if len(node.inputs) > 1 else None
    producer = None if delta is None else delta.producer()
    return producer is not None and _PACKED.fullmatch(producer.name or "") is not None


def _packed(model: ir.Model, concat: ir.Node) -> Iterator[tuple[str, ir.Value, int, int | None]]:
    """The layers that share one node, each with its own columns of the sum."""
    (use,) = concat.outputs[0].uses()
    total = _with_bias(use.node.outputs[0])
    inputs = {value.name: value for value in model.graph.inputs}
    start = 0
    for delta in concat.inputs:
        producer = None if delta is None else delta.producer()
        match = None if producer is None else _DELTA.fullmatch(producer.name or "")
        b = None if match is None else inputs.get(lora_input(match["path"], "B"))
        if match is None or b is None or b.shape is None or not isinstance(b.shape[1], int):
            return
        yield match["path"], total, start, b.shape[1]
        start += b.shape[1]


def _path_of(name: str | None) -> str:
    """The module path that a node is called by, or ``/by/slashes/MatMul`` of other exporters."""
    if not name or name.startswith("lora."):
        return ""
    if name.startswith("/"):
        return ".".join(name.split("/")[1:-1])
    return name
