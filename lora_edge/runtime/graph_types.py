"""Which nodes of an ONNX file compute with floats, read from the file itself.

ONNX Runtime says where it puts a node, by name, and not what the node works on. Knows a few
rules of ONNX's operators; needs no onnx.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_edge.files.protobuf import message, messages, number, text

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
    for place, value in messages(message(graph.read_bytes(), _MODEL_GRAPH)):
        if place == _NODES:
            nodes.append(_node(value))
        elif place == _INITIALIZERS:
            types[text(value, 8)] = number(value, 2)
        elif place == _INPUTS:
            # TypeProto.tensor_type.elem_type
            types[text(value, 1)] = number(message(message(value, 2), 1), 1)
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
    for place, value in messages(data):
        if place == 1:
            node.inputs.append(bytes(value).decode())
        elif place == 2:
            node.outputs.append(bytes(value).decode())
        elif place == 3:
            node.name = bytes(value).decode()
        elif place == 4:
            node.operator = bytes(value).decode()
        elif place == 5:
            name = text(value, 1)
            tensor = message(value, 5)
            if len(tensor):
                node.types[name] = number(tensor, 2)
            elif name in ("value_int", "value_ints"):
                node.types["value_ints"] = _INT64
            else:
                node.types[name] = number(value, 3)
    return node
