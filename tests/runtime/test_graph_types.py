"""Which nodes read floats, against onnx's own inference of types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from lora_edge.runtime.graph_types import float_work

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE}


@pytest.mark.parametrize("form", ["fused", "portable", "foreign"])
def test_it_agrees_with_onnx(tiny: Any, tmp_path: Path, form: str) -> None:
    model = tiny.graph(form)
    for node in model.graph.node:
        node.name = f"node {node.output[0]}"
    onnx.save(model, tmp_path / "model.onnx")
    graph = onnx.shape_inference.infer_shapes(model).graph
    kinds = {x.name: x.type.tensor_type.elem_type for x in (*graph.value_info, *graph.input)}
    kinds |= {x.name: x.data_type for x in graph.initializer}
    found = float_work(tmp_path / "model.onnx")
    seen = {True: 0, False: 0}
    for node in graph.node:
        read = [kinds.get(name) for name in node.input]
        if None not in read:
            reads = node.op_type != "Shape" and bool(FLOATS & set(read))
            assert found[node.name] == reads, node.name
            seen[reads] += 1
    assert min(seen.values()) >= 5


def test_types_are_followed_through_what_changes_them(tmp_path: Path) -> None:
    one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], "shape"),
        helper.make_node("Add", ["shape", "shape"], ["sum"], "sum"),
        helper.make_node("Cast", ["sum"], ["float"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Sqrt", ["float"], ["root"], "root"),
        helper.make_node("Cast", ["root"], ["back"], "back", to=TensorProto.INT64),
        helper.make_node("Constant", [], ["one"], "constant", value=one),
        helper.make_node("Constant", [], ["two"], "ints", value_ints=[2]),
        helper.make_node("Concat", ["one", "two", "back"], ["row"], "row", axis=0),
        helper.make_node("ConstantOfShape", ["row"], ["zeros"], "zeros"),
        helper.make_node("IsNaN", ["zeros"], ["nan"], "nan"),
        helper.make_node("Where", ["nan", "one", "row"], ["chosen"], "where"),
        helper.make_node("Reshape", ["x", "chosen"], ["y"], "reshape"),
        helper.make_node("Own", ["mystery"], ["z"], "own", domain="somebody"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["n"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["n"])
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [y])), tmp_path / "m.onnx")
    found = float_work(tmp_path / "m.onnx")
    assert {name for name, reads in found.items() if reads} == {
        *("root", "back", "nan", "reshape"),
        "own",  # nobody knows
    }
