"""Branches become native sums where they are one pair and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
import pytest

from lora_edge.files.protobuf import bytes_field, fields, message, messages, text, varint_field
from lora_edge.runtime.native.rewrite import Node, with_native
from tests.support.native import native

LAST = bytes_field(1, "axis") + varint_field(3, (1 << 64) - 1) + varint_field(20, 2)
FIRST = bytes_field(1, "axis") + varint_field(3, 1) + varint_field(20, 2)


def _branch(path: str, y: str, total: str, x: str = "x", more: str = "") -> list[Node]:
    """``total = y + x A B``; ``more`` is added too."""
    up = f"{path}.up"
    nodes = [
        Node("MatMul", [x, f"lora.{path}.A"], [f"{path}.down"], f"{path}.down"),
        Node("MatMul", [f"{path}.down", f"lora.{path}.B"], [up], up),
    ]
    if more:
        nodes.append(Node("Add", [up, more], [f"{path}.both"], f"{path}.both"))
        up = f"{path}.both"
    return [*nodes, Node("Add", [y, up], [total], f"{path}.add")]


def _packed(axis: bytes = LAST) -> list[Node]:
    names = ["q.base", "k.base"]
    return [
        Node("MatMul", ["x", "W"], ["qk"], "qk"),
        Node("Split", ["qk", "sizes"], names, "split", "", [axis]),
    ]


def _model(nodes: Sequence[Node], outputs: Sequence[str], inputs: Sequence[str]) -> bytes:
    def value(name: str) -> bytes:
        kind = 7 if name == "sizes" else 1
        return bytes_field(1, name) + bytes_field(2, bytes_field(1, varint_field(1, kind)))

    graph = [node.encoded() for node in nodes] + [bytes_field(2, "graph")]
    graph += [bytes_field(11, value(x)) for x in inputs]
    graph += [bytes_field(12, value(x)) for x in outputs]
    opset = bytes_field(1, "") + varint_field(2, 17)
    return varint_field(1, 8) + bytes_field(8, opset) + bytes_field(7, b"".join(graph))


def _operators(model: bytes) -> Counter[str]:
    return Counter(text(node, 4) for n, node in messages(message(model, 7)) if n == 1)


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"x": (2, 3, 8), "W": (8, 12), "bias": (8,)}
    for path, size in (("q", 8), ("k", 4), ("o", 12)):
        shapes |= {f"lora.{path}.A": (8, 2), f"lora.{path}.B": (2, size)}
    return shapes


def _run(model: bytes, outputs: Sequence[str]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(str(native().library))
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal(s, np.float32) for name, s in _shapes().items()}
    feeds["sizes"] = np.array([8, 4], np.int64)
    given = {x.name: feeds[x.name] for x in session.get_inputs()}
    found: list[np.ndarray] = session.run(list(outputs), given)
    return found


ALL = [*_shapes(), "sizes"]
Q, K = _branch("q", "q.base", "q"), _branch("k", "k.base", "k")
O = [Node("MatMul", ["x", "W"], ["o.base"], "o"), *_branch("o", "o.base", "o.sum")]  # noqa: E741
JOINED = [
    Node("MatMul", ["x", "W"], ["qk"], "qk"),
    *[node for node in (*Q, *K) if node.operator == "MatMul"],
    Node("Concat", ["q.up", "k.up"], ["terms"], "terms", "", [LAST]),
    Node("Add", ["qk", "terms"], ["sum"], "sum"),
]
CASES = {
    # nodes, outputs, sums that are to be native, MatMuls that are left
    "packed": ([*_packed(), *Q, *K], ["q", "k"], 1, 1),
    "in another order": ([*_packed(), *K, *Q], ["k", "q"], 1, 1),
    "alone": (O, ["o.sum"], 1, 1),
    "both": ([*_packed(), *Q, *K, *O], ["q", "k", "o.sum"], 2, 2),
    "one of two": ([*_packed(), *Q], ["q", "k.base"], 1, 1),
    "with more": (
        [*_packed(), *_branch("q", "q.base", "q", more="bias"), *K],
        ["q", "k"],
        1,
        3,
    ),
    "the base is read too": ([*_packed(), *Q, *K], ["q", "k", "q.base"], 1, 3),
    "the whole is read too": ([*_packed(), *Q, *K], ["q", "k", "qk"], 2, 1),
    "what is added is read too": ([*O], ["o.sum", "o.up"], 0, 3),
    "other activations": (
        [Node("Neg", ["x"], ["z"], "neg"), *_packed(), *Q, *_branch("k", "k.base", "k", "z")],
        ["q", "k"],
        2,
        1,
    ),
    "joined": (JOINED, ["sum"], 1, 1),
    "a joined term is read too": (JOINED, ["sum", "k.up"], 0, 5),
    "none": (_packed(), ["q.base", "k.base"], 0, 1),
}


@pytest.mark.parametrize(("nodes", "outputs", "sums", "left"), CASES.values(), ids=CASES)
def test_every_branch_that_is_one_pair(
    nodes: list[Node], outputs: list[str], sums: int, left: int
) -> None:
    model = _model(nodes, outputs, ALL)
    found = with_native(model)
    assert (found == model) == (sums == 0)
    operators = _operators(found)
    assert (operators["LoraSum"], operators["MatMul"]) == (sums, left)
    for value, wanted in zip(_run(found, outputs), _run(model, outputs), strict=True):
        np.testing.assert_allclose(value, wanted, atol=1e-5)


def test_another_axis_is_left_alone() -> None:
    """A sum over the last axis is one over the parts of the last axis only."""
    model = _model([*_packed(FIRST), *Q, *K], ["q", "k"], ALL)
    found = [
        [bytes(value).decode() for n, value in messages(node) if n in (1, 2)]
        for place, node in messages(message(with_native(model), 7))
        if place == 1 and text(node, 4) == "LoraSum"
    ]
    assert [names[0] for names in found] == ["q.base", "k.base"]


def test_attention_reads_the_whole() -> None:
    for read, splits in ((["q", "k", "v"], 0), (["q", "v", "k"], 1)):
        nodes = [
            Node("MatMul", ["x", "W"], ["qkv"], "qkv"),
            Node("Split", ["qkv", "sizes"], ["q.base", "k.base", "v.base"], "split", "", [LAST]),
            *Q,
            *K,
            *_branch("v", "v.base", "v"),
            Node("GroupQueryAttention", read, ["y"], "attention", "com.microsoft"),
        ]
        found = with_native(_model(nodes, ["y"], []))
        assert _operators(found)["Split"] == splits
        (attention,) = [
            node
            for n, node in messages(message(found, 7))
            if n == 1 and text(node, 4) == "GroupQueryAttention"
        ]
        inputs = [bytes(value).decode() for n, value in messages(attention) if n == 1]
        assert inputs == (read if splits else ["qkv.summed", "", ""])


def test_what_a_graph_within_a_node_reads_is_read() -> None:
    inner = Node("Identity", ["o.base"], ["then"], "inner").encoded() + bytes_field(2, "then")
    attribute = bytes_field(1, "then_branch") + bytes_field(6, inner) + varint_field(20, 5)
    nodes = [*O, Node("If", ["flag"], ["y"], "if", "", [attribute])]
    model = _model(nodes, ["o.sum", "y"], [])
    assert with_native(model) == model


def test_all_else_of_the_file_is_kept() -> None:
    model = _model(O, ["o.sum"], ALL) + bytes_field(
        14, bytes_field(1, "who") + bytes_field(2, "us")
    )
    found = with_native(model)
    kept = [bytes(x.whole) for x in fields(found) if x.number not in (7, 8)]
    assert kept == [bytes(x.whole) for x in fields(model) if x.number not in (7, 8)]
    inner, outer = (
        [bytes(x.whole) for x in fields(message(one, 7)) if x.number != 1] for one in (found, model)
    )
    assert inner == outer
    opsets = [(text(x, 1), bytes(x)[-1]) for n, x in messages(found) if n == 8]
    assert opsets == [("", 17), ("lora_edge", 1)]
