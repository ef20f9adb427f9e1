"""Every layer's output as a graph output: the right value under the right name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from lora_edge.graph import branch, find_sites, save_with_data
from lora_edge.graph.taps import TappedGraph, tap
from tests.support.small_graphs import BATCH, SEQ, Array, Shape, Small, draw, factors, lora_feeds

X = draw(BATCH, SEQ, 6, seed=42)
WIDE = 40  # so that the weights are in the data file


def _run(tapped: TappedGraph, feeds: dict[str, Array]) -> dict[str, Array]:
    options = ort.SessionOptions()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(tapped.folder)
    )
    session = ort.InferenceSession(tapped.model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


def _tap(model: ir.Model, folder: Path) -> TappedGraph:
    save_with_data(model, folder / "model.onnx")
    assert (folder / "model.onnx_data").is_file()
    return tap(folder / "model.onnx")


def test_with_branches_with_biases_and_without(tmp_path: Path) -> None:
    small = Small(6)
    up, middle, down = draw(6, WIDE, seed=1), draw(WIDE, WIDE, seed=2), draw(WIDE, 4, seed=3)
    bias, shift = draw(WIDE, seed=4), draw(4, seed=5)
    h = small.op("Add", small.linear(small.x, "a.up", up), small.weight("a.up.bias", bias))
    h = small.linear(small.op("Tanh", h), "a.middle", middle)
    y = small.op("Add", small.linear(h, "a.down", down), small.weight("a.down.bias", shift))
    model = small.model(y)
    pairs = {"a.up": factors(6, WIDE, 3), "a.middle": factors(WIDE, WIDE, 2, seed=7)}
    branch(model, find_sites(model, {"a.up": Shape(6, WIDE), "a.middle": Shape(WIDE, WIDE)}))
    tapped = _tap(model, tmp_path)
    assert len(tapped.model) < 6000  # without the weights
    assert list(tapped.layers) == ["a.up", "a.middle", "a.down"]
    found = _run(tapped, {"x": X, **lora_feeds(pairs)})
    one = X @ up + X @ pairs["a.up"].A @ pairs["a.up"].B + bias
    x = np.tanh(one)
    two = x @ middle + x @ pairs["a.middle"].A @ pairs["a.middle"].B
    for path, expected in (("a.up", one), ("a.middle", two), ("a.down", two @ down + shift)):
        np.testing.assert_allclose(found[tapped.layers[path].value], expected, atol=1e-3)
    assert tapped.layers["a.down"].value == "y0"  # an output already


@pytest.mark.parametrize("transposed", [False, True])
def test_packed_projections_are_slices_of_one_value(transposed: bool, tmp_path: Path) -> None:
    q, k, v = (draw(6, n, seed=n) for n in (25, 13, 17))
    whole = np.concatenate([q, k, v], axis=1)
    small = Small(6)
    if transposed:
        weight = small.weight("w", np.ascontiguousarray(whole.T))
        y = small.flattened(small.x, "qkv", weight, transB=1)
    else:
        y = small.linear(small.x, "qkv", whole)
    model = small.model(y)
    weights = {f"a.{name}.weight": x.T.copy() for name, x in (("q", q), ("k", k), ("v", v))}
    shapes = {"a.q": Shape(6, 25), "a.k": Shape(6, 13), "a.v": Shape(6, 17)}
    branch(model, find_sites(model, shapes, weights.get))
    pairs = {"a.q": factors(6, 25, 2), "a.k": factors(6, 13, 1), "a.v": factors(6, 17, 3, seed=5)}
    tapped = _tap(model, tmp_path)
    found = _run(tapped, {"x": X, **lora_feeds(pairs)})
    for path, weight in (("a.q", q), ("a.k", k), ("a.v", v)):
        where = tapped.layers[path]
        assert where.width is not None
        actual = found[where.value][..., where.start : where.start + where.width]
        expected = X @ weight + X @ pairs[path].A @ pairs[path].B
        np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize("branched", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_embeddings_but_not_those_that_may_be_scaled_in_the_module(
    scale: float, branched: bool, tmp_path: Path
) -> None:
    table, head = draw(50, 6, seed=1), draw(6, WIDE, seed=2)
    small = Small(6)
    ids_type = ir.TensorType(ir.DataType.INT64)
    small.x = ir.Value(name="x", shape=ir.Shape(["batch", "seq"]), type=ids_type)
    h = small.op("Gather", small.weight("embed.weight", table), small.x)
    if scale != 1.0:
        h = small.op("Mul", h, small.weight("scale", np.float32(scale)))
    model = small.model(small.linear(h, "head", head))
    ids = np.array([[3, 4], [7, 1]])
    feeds, rows = {"x": ids}, table[ids]
    if branched:
        branch(model, find_sites(model, {"embed": Shape(50, 6, "embedding")}))
        pair = factors(50, 6, 3)
        feeds, rows = {**feeds, **lora_feeds({"embed": pair})}, rows + pair.A[ids] @ pair.B
    tapped = _tap(model, tmp_path)
    found = _run(tapped, feeds)
    np.testing.assert_allclose(found["y0"], rows * np.float32(scale) @ head, atol=1e-3)
    if scale == 1.0:
        assert list(tapped.layers) == ["embed", "head"]
        np.testing.assert_allclose(found[tapped.layers["embed"].value], rows, atol=1e-5)
    else:
        assert list(tapped.layers) == ["head"]
