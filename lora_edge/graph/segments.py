"""A graph as a row of smaller ones, which run one after the other and give what the whole gives.

Each has some of the nodes, in the order of the whole, and reads only the weights of those. What one
computes for a later one is an output of the first and an input of the second. So a model runs of
which a part is in memory at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from lora_edge.errors import GraphError

_ELEMENTS = {
    "float": onnx.TensorProto.FLOAT,
    "uint8": onnx.TensorProto.UINT8,
    "int8": onnx.TensorProto.INT8,
    "uint16": onnx.TensorProto.UINT16,
    "int16": onnx.TensorProto.INT16,
    "int32": onnx.TensorProto.INT32,
    "int64": onnx.TensorProto.INT64,
    "bool": onnx.TensorProto.BOOL,
    "float16": onnx.TensorProto.FLOAT16,
    "double": onnx.TensorProto.DOUBLE,
    "uint32": onnx.TensorProto.UINT32,
    "uint64": onnx.TensorProto.UINT64,
    "bfloat16": onnx.TensorProto.BFLOAT16,
}  # as ONNX Runtime writes them


@dataclass(frozen=True)
class Segment:
    """Some nodes of a graph.

    Attributes:
        reads: what it reads that an earlier segment gives.
        gives: what it gives to later ones, and which of the graph's outputs.
        ends: those of them that are the graph's outputs.
        size: bytes of the weights that it reads.
    """

    reads: tuple[str, ...]
    gives: tuple[str, ...]
    ends: tuple[str, ...]
    size: int
    _whole: onnx.ModelProto
    _nodes: tuple[onnx.NodeProto, ...]
    _named: Set[str]  # initializers and inputs of the graph that the nodes read

    def model(self, types: Mapping[str, str]) -> bytes:
        """The segment as an ONNX model of its own, external tensors by reference.

        Args:
            types: of each of :attr:`reads` its type as ONNX Runtime writes it, ``tensor(float)``.
        """
        whole = self._whole.graph
        made = onnx.ModelProto()
        made.ir_version = self._whole.ir_version
        made.opset_import.extend(self._whole.opset_import)
        made.functions.extend(self._whole.functions)
        graph = made.graph
        graph.name = whole.name
        graph.node.extend(self._nodes)
        graph.initializer.extend(x for x in whole.initializer if x.name in self._named)
        held = {x.name for x in graph.initializer}
        graph.input.extend(x for x in whole.input if x.name in self._named - held)
        for name in self.reads:
            kind = _ELEMENTS[types[name].removeprefix("tensor(").removesuffix(")")]
            value = graph.input.add(name=name)
            value.type.tensor_type.elem_type = kind
        outputs = {x.name: x for x in whole.output}
        for name in self.gives:
            if name in outputs:
                graph.output.append(outputs[name])
            else:
                graph.output.add(name=name)
        found: bytes = made.SerializeToString()
        return found


def segments(path: str | os.PathLike[str], limit: int) -> list[Segment]:
    """Cut a graph.

    Args:
        path: its file.
        limit: bytes of weights of a segment; more where a single node reads more.

    Raises:
        GraphError: the file is missing or is not an ONNX model.
    """
    file = Path(path)
    try:
        model = onnx.load(file, load_external_data=False)
    except (OSError, ValueError, DecodeError) as error:
        raise GraphError(f"{file} is not an ONNX model: {error}", "Export it again.") from error
    graph = model.graph
    sizes = {x.name: _bytes(x) for x in graph.initializer}
    known = {*sizes, *(x.name for x in graph.input)}
    last = {x.name for x in graph.output}
    # Those are no values that a session could read: operators may need to know them.
    constants = {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "Constant" and node.output[0] not in last
    }
    groups = [*_groups([x for x in graph.node if x.output[0] not in constants], sizes, limit)]
    maker = {name: i for i, own in enumerate(groups) for node in own for name in node.output}
    if not last <= set(maker):  # an output that is an input, or a weight
        ends = tuple(x.name for x in graph.output)
        return [Segment((), ends, ends, sum(sizes.values()), model, (*graph.node,), known)]
    wanted: list[dict[str, None]] = [{} for _ in groups]
    for index, own in enumerate(groups):
        for node in own:
            for name in _reads(node):
                if name in maker and maker[name] != index:
                    wanted[index][name] = None
    asked = last.union(*wanted)
    found = []
    for index, own in enumerate(groups):
        read = {name for node in own for name in _reads(node)}
        copied = dict.fromkeys(id(constants[x]) for x in read if x in constants)
        first = [node for node in graph.node if id(node) in copied]
        gives = tuple(x for node in own for x in node.output if x in asked)
        ends = tuple(x for x in gives if x in last)
        reads = tuple(wanted[index])
        size = sum(sizes[x] for x in read if x in sizes)
        found.append(Segment(reads, gives, ends, size, model, (*first, *own), read & known))
    return [x for x in found if x.gives]


def _groups(
    nodes: Iterable[onnx.NodeProto], sizes: Mapping[str, int], limit: int
) -> Iterator[list[onnx.NodeProto]]:
    """Nodes that run one after the other, of which each group reads so many bytes."""
    group: list[onnx.NodeProto] = []
    read: dict[str, int] = {}
    for node in nodes:
        more = {x: sizes[x] for x in _reads(node) if x in sizes and x not in read}
        had, new = sum(read.values()), sum(more.values())
        if had and new and had + new > limit:
            yield group
            group, read = [], {}
            more = {x: sizes[x] for x in _reads(node) if x in sizes}
        group.append(node)
        read |= more
    if group:
        yield group


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, graphs in it included: names of their own are never the whole's."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            inner = {x.name for x in (*graph.input, *graph.initializer)}
            inner |= {name for own in graph.node for name in own.output}
            for own in graph.node:
                yield from (x for x in _reads(own) if x not in inner)
            yield from (x.name for x in graph.output if x.name not in inner)


def _bytes(tensor: onnx.TensorProto) -> int:
    told = {x.key: x.value for x in tensor.external_data}
    return int(told["length"]) if "length" in told else tensor.ByteSize()
