"""Fusing residual sums with norms: the same numbers, fewer nodes, no weights read."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from lora_edge.base.checkpoint import resolve_base
from lora_edge.capture import capture
from lora_edge.graph import check, fuse, load, save_graph
from tests.support.families import make_base

_EPS = 1e-5


def _norm_model(*, sum_read_early: bool = False, bias: bool = False) -> ir.Model:
    """The norm of ``x + y``, a second norm of it, and ``x + y`` itself, all added."""
    right = "bias" if bias else "y"
    early = "early = Neg (total)" if sum_read_early else ""
    early = "[early] early = Neg (total)" if sum_read_early else ""
    then = "Add (b0, early)" if sum_read_early else "Identity (b0)"
    attributes = f"<axis = -1, epsilon = {_EPS}>"
    biases = ", float[6] bias = {1, 2, 3, 4, 5, 6}" if bias else ""
    text = f"""
    <ir_version: 8, opset_import: ["" : 18, "com.microsoft" : 1]>
    g (float[b, s, 6] x, float[b, s, 6] y) => (float[b, s, 6] out)
    <float[6] w1 = {{1.5, -0.5, 2, 0.25, 1, 3}}, float[6] w2 = {{0.5, 1.25, -1, 2, 4, 1}}{biases}>
    {{
        [total] total = Add (x, {right})
        {early}
        [first] a = SimplifiedLayerNormalization {attributes} (total, w1)
        [second] b0 = SimplifiedLayerNormalization {attributes} (a, w2)
        [then] c = {then}
        [both] d = Add (c, a)
        [out] out = Add (d, total)
    }}
    """
    return ir.from_onnx_text(text)


def _operators(model: ir.Model) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in model.graph)


def _run(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, feeds)
    return np.asarray(out)


def _feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    # Near sqrt(eps), so that an epsilon that is lost or misplaced shows.
    return {name: (rng.standard_normal((2, 3, 6)) * 4e-3).astype(np.float32) for name in ("x", "y")}


def _expected(feeds: dict[str, np.ndarray], *, eps: float = _EPS) -> np.ndarray:
    def norm(x: np.ndarray, weight: list[float]) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * np.array(weight)

    total = feeds["x"].astype(np.float64) + feeds["y"]
    first = norm(total, [1.5, -0.5, 2, 0.25, 1, 3])
    return norm(first, [0.5, 1.25, -1, 2, 4, 1]) + first + total


def test_a_sum_and_its_norm_become_one_operator() -> None:
    model, feeds = _norm_model(), _feeds()
    fuse(model)
    operators = _operators(model)
    assert operators["SkipSimplifiedLayerNormalization"] == 1
    assert operators["SimplifiedLayerNormalization"] == 0
    onnx.checker.check_model(ir.to_proto(model))
    got = _run(model, feeds)
    np.testing.assert_allclose(got, _expected(feeds), atol=1e-6)
    assert np.abs(got - _expected(feeds, eps=1e-6)).max() > 1e-2  # the control


def test_a_sum_that_is_read_before_the_norm_is_left_alone() -> None:
    model, feeds = _norm_model(sum_read_early=True), _feeds()
    fuse(model)
    assert _operators(model)["SkipSimplifiedLayerNormalization"] == 0
    wanted = _expected(feeds) - (feeds["x"].astype(np.float64) + feeds["y"])
    np.testing.assert_allclose(_run(model, feeds), wanted, atol=1e-6)


def test_a_bias_is_no_residual() -> None:
    model, feeds = _norm_model(bias=True), _feeds()
    fuse(model)
    assert _operators(model)["SkipSimplifiedLayerNormalization"] == 0
    biased = {"x": feeds["x"], "y": np.broadcast_to(np.arange(1, 7), (2, 3, 6))}
    np.testing.assert_allclose(_run(model, feeds), _expected(biased), rtol=1e-5)


@pytest.mark.parametrize(("shape", "left"), [("b, s, 6", 0), ("b, s, 3, 2", 2)])
def test_views_are_undone_where_they_change_nothing(shape: str, left: int) -> None:
    """A 4-D input comes out 3-D, so its pair of views must stay."""
    model = ir.from_onnx_text(f"""
    <ir_version: 8, opset_import: ["" : 18]>
    g (float[{shape}] x) => (float[b, s, 6] out)
    <int64[4] heads = {{0, 0, 2, 3}}, int64[3] flat = {{0, 0, -1}}>
    {{
        [split] h = Reshape (x, heads)
        [join] j = Reshape (h, flat)
        [out] out = Neg (j)
    }}
    """)
    fuse(model)
    assert _operators(model)["Reshape"] == left
    sizes = (2, 5, 6) if left == 0 else (2, 5, 3, 2)
    x = np.random.default_rng(0).standard_normal(sizes).astype(np.float32)
    np.testing.assert_array_equal(_run(model, {"x": x}), -x.reshape(2, 5, 6))


@pytest.mark.parametrize(("family", "skips"), [("llama", 4), ("gemma2", 4), ("gpt2", 0)])
def test_a_captured_graph(family: str, skips: int, tmp_path: Path) -> None:
    base = resolve_base(make_base(family, tmp_path / "base"))
    path = capture(base, tmp_path).path()
    before = path.with_name("model.onnx_data").read_bytes()
    path.with_name("model.onnx_data").unlink()  # the pass may not read a weight
    model = load(path)
    fuse(model)
    save_graph(model, path)
    path.with_name("model.onnx_data").write_bytes(before)
    check(path)
    operators = _operators(load(path))
    assert operators["SkipSimplifiedLayerNormalization"] == skips
    assert operators["SimplifiedLayerNormalization"] == 0
    used = {value for node in model.graph for value in node.inputs} | set(model.graph.outputs)
    assert all(used & set(node.outputs) for node in model.graph)
    assert operators["Identity"] == 0
    if family == "llama":
        assert operators["Reshape"] == 0


def test_onnxruntime_joins_what_is_written_out(tmp_path: Path) -> None:
    model = _norm_model()
    fuse(model)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    data = ir.to_proto(model).SerializeToString()
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(options.optimized_model_filepath)
    operators = collections.Counter(node.op_type for node in optimized.graph.node)
    assert operators["SimplifiedLayerNormalization"] == 1
    assert operators["ReduceMean"] == 0
