"""Which nodes of an ONNX file compute with floats, read from the file itself.

ONNX Runtime says where it puts a node, by name, and not what the node works on. Knows the wire
format of protobuf and a few rules of ONNX's operators; needs no onnx.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_FLOAT, _INT64, _BOOL = 1, 7, 9
_FLOATS = frozenset({1, 10, 11, 16, 17, 18, 19, 20})  # float, float16, double, bfloat16, float8
_MODEL_GRAPH = 7
_NODES, _INITIALIZERS, _INPUTS = 1, 5, 11

_TO_INT64 = frozenset({"Shape", "Size", "NonZero", "ArgMax", "ArgMin"})
_TO_BOOL = frozenset(
    {"And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Not"}
    | {"Or", "Xor"}
)
_READS_NO_VALUES = frozenset({"Shape", "Size"})


@dataclass
class _Node:
    name: str = ""
    operator: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    types: dict[str, int] = field(default_factory=dict)  # attribute -> its dtype, or its integer


def float_work(graph: Path) -> Mapping[str, bool]:
    """Of each node by its name, whether it reads floats.

    What only looks at shapes (``Shape``, ``Size``) reads none, nor does what makes floats of
    integers (``Cast``) or of nothing (``ConstantOfShape``). Where the type of an input is not
    known, the node counts as reading floats.
    """
    types: dict[str, int] = {}
    found: dict[str, bool] = {}
    nodes: list[_Node] = []
    for number, value in _fields(_message(graph.read_bytes(), _MODEL_GRAPH)):
        if number == _NODES:
            nodes.append(_node(value))
        elif number == _INITIALIZERS:
            types[_text(value, 8)] = _number(value, 2)
        elif number == _INPUTS:
            # TypeProto.tensor_type.elem_type
            types[_text(value, 1)] = _number(_message(_message(value, 2), 1), 1)
    for node in nodes:  # which are in topological order
        read = [types.get(name, _FLOAT) for name in node.inputs if name]
        reads = node.operator not in _READS_NO_VALUES and any(kind in _FLOATS for kind in read)
        found[node.name] = reads
        types.update(dict.fromkeys(node.outputs, _made(node, read)))
    return found


def _made(node: _Node, read: list[int]) -> int:
    """The dtype of a node's outputs."""
    if node.operator in _TO_INT64:
        return _INT64
    if node.operator in _TO_BOOL:
        return _BOOL
    if node.operator == "Cast":
        return node.types.get("to", _FLOAT)
    if node.operator in ("Constant", "ConstantOfShape"):
        return node.types.get("value", node.types.get("value_ints", _FLOAT))
    if node.operator == "Where":
        return read[1] if len(read) > 1 else _FLOAT
    return read[0] if read else _FLOAT


def _node(data: memoryview) -> _Node:
    node = _Node()
    for number, value in _fields(data):
        if number == 1:
            node.inputs.append(bytes(value).decode())
        elif number == 2:
            node.outputs.append(bytes(value).decode())
        elif number == 3:
            node.name = bytes(value).decode()
        elif number == 4:
            node.operator = bytes(value).decode()
        elif number == 5:
            name = _text(value, 1)
            tensor = _message(value, 5)
            if len(tensor):
                node.types[name] = _number(tensor, 2)
            elif name in ("value_int", "value_ints"):
                node.types["value_ints"] = _INT64
            else:
                node.types[name] = _number(value, 3)
    return node


def _message(data: bytes | memoryview, wanted: int) -> memoryview:
    """The bytes of a message's first field of that number; none where it has none."""
    for number, value in _fields(memoryview(data)):
        if number == wanted:
            return value
    return memoryview(b"")


def _text(data: memoryview, wanted: int) -> str:
    return bytes(_message(data, wanted)).decode()


def _number(data: memoryview, wanted: int) -> int:
    """A varint field; 0 where it is absent."""
    return next((value for number, value in _varints(data) if number == wanted), 0)


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(number, bytes) of the length-delimited fields of a message."""
    for number, value, _ in _walk(data):
        if value is not None:
            yield number, value


def _varints(data: memoryview) -> Iterator[tuple[int, int]]:
    for number, value, integer in _walk(data):
        if value is None:
            yield number, integer


def _walk(data: memoryview) -> Iterator[tuple[int, memoryview | None, int]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            integer, at = _varint(data, at)
            yield key >> 3, None, integer
        elif kind == 2:
            size, at = _varint(data, at)
            yield key >> 3, data[at : at + size], 0
            at += size
        else:
            at += 8 if kind == 1 else 4


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
