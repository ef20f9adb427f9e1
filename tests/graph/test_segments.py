"""A graph that is cut gives what the whole gives, and its parts read no more than they should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from lora_edge.errors import GraphError
from lora_edge.graph.segments import segments
from lora_edge.runtime.segmented import SegmentedSession

_SIZE = 64
_WEIGHT = 4 * _SIZE * _SIZE


def _graph(path: Path) -> Path:
    """Three weights of 16 KiB; a value that crosses all, one of integers, a constant, an ``If``."""
    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(random.standard_normal((_SIZE, _SIZE)).astype(np.float32), f"w{i}")
        for i in range(3)
    ]

    def branch(name: str, factor: float) -> onnx.GraphProto:
        scale = numpy_helper.from_array(np.array(factor, np.float32), f"{name}.scale")
        node = helper.make_node("Mul", ["a", f"{name}.scale"], [f"{name}.y"])
        out = helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, None)
        return helper.make_graph([node], name, [], [out], [scale])

    axes = numpy_helper.from_array(np.array([-1, _SIZE], np.int64))
    nodes = [
        helper.make_node("Constant", [], ["shape"], value=axes),
        helper.make_node("Shape", ["x"], ["count"]),
        helper.make_node("Reshape", ["x", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w0"], ["a"]),
        helper.make_node("MatMul", ["a", "w1"], ["b"]),
        helper.make_node(
            "If", ["flag"], ["c"], then_branch=branch("then", 2.0), else_branch=branch("else", 3.0)
        ),
        helper.make_node("Add", ["b", "c"], ["d"]),
        helper.make_node("MatMul", ["d", "w2"], ["e"]),
        helper.make_node("Reshape", ["e", "shape"], ["again"]),
        helper.make_node("Reshape", ["again", "count"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", _SIZE]),
        helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
    ]
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
        helper.make_tensor_value_info("b", TensorProto.FLOAT, None),
    ]
    graph = helper.make_graph(nodes, "small", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    data = f"{path.name}_data"
    onnx.save(model, path, save_as_external_data=True, location=data, size_threshold=1024)
    return path


@pytest.mark.parametrize(("limit", "count"), [(1, 3), (_WEIGHT, 3), (2 * _WEIGHT, 2), (1 << 30, 1)])
def test_the_parts_give_what_the_whole_gives(tmp_path: Path, limit: int, count: int) -> None:
    path = _graph(tmp_path / "model.onnx")
    parts = segments(path, limit)
    assert len(parts) == count
    assert sum(part.size for part in parts) == 3 * _WEIGHT
    assert all(part.size <= max(limit, _WEIGHT) for part in parts)
    assert {name for part in parts for name in part.ends} == {"y", "b"}
    whole = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    cut = SegmentedSession(path, parts, "all", 1)
    assert [x.name for x in cut.get_inputs()] == ["x", "flag"]
    assert {x.name for x in cut.get_outputs()} == {"y", "b"}
    io = cut.io_binding()
    io.bind_output("y")
    io.bind_output("b")
    for rows, flag in ((3, True), (5, False)):  # of another shape each time
        x = np.random.default_rng(rows).standard_normal((rows, _SIZE)).astype(np.float32)
        wanted = whole.run(["y", "b"], {"x": x, "flag": np.array(flag)})
        io.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x))
        io.bind_ortvalue_input("flag", ort.OrtValue.ortvalue_from_numpy(np.array(flag)))
        cut.let_go()
        io.bind_output("y")
        io.bind_output("b")
        cut.run_with_iobinding(io)
        for found, expected in zip(io.copy_outputs_to_cpu(), wanted, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(GraphError, match=r"model\.onnx is not an ONNX model"):
        segments(path, 1)
