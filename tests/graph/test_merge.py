"""Merging, run on ONNX Runtime against numpy: layouts, packing, ties, and who else reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
import pytest

from lora_edge.errors import GraphError
from lora_edge.graph import find_sites, merge
from lora_edge.maths.lora import Factors, delta
from tests.support.small_graphs import BATCH, SEQ, Run, Shape, Small, draw, factors

X = draw(BATCH, SEQ, 6, seed=42)
W = draw(6, 5, seed=1)
PAIR = factors(6, 5, 3, seed=10)
ONE = {"q": Shape(6, 5)}


def added(pairs: Mapping[str, Factors]) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """What :func:`merge` is given for plain LoRA: ``W + ΔW`` of ``[out, in]``."""
    return {f"{path}.weight": lambda w, p=pair: w + delta(p).T for path, pair in pairs.items()}


def _merged(weight: np.ndarray, pair: Factors) -> np.ndarray:
    """``[in, out]``, summed in float64 and rounded once."""
    return (weight.astype(np.float64) + delta(pair)).astype(weight.dtype)


@pytest.mark.parametrize("layout", ["plain", "transposed", "gemm", "gemm transposed"])
def test_every_layout_of_the_weight(layout: str, run: Run) -> None:
    small = Small(6)
    turned = layout.endswith("transposed")
    weight = small.weight("w", np.ascontiguousarray(W.T) if turned else W)
    if layout.startswith("gemm"):
        y = small.flattened(small.x, "g", weight, **({"transB": 1} if turned else {}))
    else:
        y = small.op(
            "MatMul", small.x, small.op("Transpose", weight, perm=[1, 0]) if turned else weight
        )
    model = small.model(y)
    merge(model, find_sites(model, ONE, lambda _: np.ascontiguousarray(W.T)), added({"q": PAIR}))
    (actual,) = run(model, X)
    np.testing.assert_allclose(actual, X @ _merged(W, PAIR), atol=1e-5)
    assert np.abs(actual - X @ W).max() > 0.1
    # In place: no second copy.
    assert sum(v.shape == weight.shape for v in model.graph.initializers.values()) == 1


def test_the_sum_is_wide_and_rounded_once(run: Run) -> None:
    """Three terms that cancel: in float32 their sum would lose the 1."""
    small = Small(6)
    model = small.model(small.linear(small.x, "q", W))
    a = np.zeros((6, 3), np.float32)
    a[0] = [1e8, 1, -1e8]
    pair = Factors(a, np.ones((3, 5), np.float32))
    merge(model, find_sites(model, ONE), added({"q": pair}))
    np.testing.assert_allclose(run(model, X)[0], X @ W + X[..., :1], atol=1e-5)


Q, K = draw(6, 5, seed=5), draw(6, 3, seed=3)
PACKED = {"a.q": Shape(6, 5), "a.k": Shape(6, 3)}
BOTH = {"a.q": factors(6, 5, 2), "a.k": factors(6, 3, 4, seed=7)}


def _weight_of(path: str) -> np.ndarray:
    return np.ascontiguousarray((Q if path == "a.q.weight" else K).T)


def _expected(*paths: str) -> np.ndarray:
    """What the packed node gives with some of its layers merged."""
    parts = [
        _merged(weight, BOTH[path]) if path in paths else weight
        for path, weight in (("a.q", Q), ("a.k", K))
    ]
    return X @ np.concatenate(parts, axis=1)


@pytest.mark.parametrize("paths", [("a.q", "a.k"), ("a.k", "a.q"), ("a.k",)])
@pytest.mark.parametrize("transposed", [False, True])
def test_packed_projections_are_merged_by_slice(
    paths: tuple[str, ...], transposed: bool, run: Run
) -> None:
    small = Small(6)
    whole = np.concatenate([Q, K], axis=1)
    weight = small.weight("w", np.ascontiguousarray(whole.T) if transposed else whole)
    turned = small.op("Transpose", weight, perm=[1, 0]) if transposed else weight
    model = small.model(small.op("MatMul", small.x, turned))
    sites = find_sites(model, PACKED, _weight_of)
    merge(model, sites, added({path: BOTH[path] for path in paths}))
    np.testing.assert_allclose(run(model, X)[0], _expected(*paths), atol=1e-5)
    assert np.abs(_expected(*paths) - _expected()).max() > 0.1


@pytest.mark.parametrize("transposed", [False, True])
def test_a_packed_weight_with_a_second_reader_keeps_it_and_loses_no_delta(
    transposed: bool, run: Run
) -> None:
    small = Small(6)
    whole = np.concatenate([Q, K], axis=1)
    weight = small.weight("w", np.ascontiguousarray(whole.T) if transposed else whole)
    turned = small.op("Transpose", weight, perm=[1, 0]) if transposed else weight
    packed = small.op("MatMul", small.x, turned)
    untouched = small.op("Neg", turned)
    untouched.shape = ir.Shape(whole.shape)
    model = small.model(packed, untouched)
    merge(model, find_sites(model, PACKED, _weight_of), added(BOTH))
    merged, negative = run(model, X)
    np.testing.assert_allclose(merged, _expected("a.q", "a.k"), atol=1e-5)
    np.testing.assert_array_equal(negative, -whole)


def test_a_tied_weight_is_untied(run: Run) -> None:
    """The embedding that the head is tied to stays as it was."""
    small = Small(6)
    table = draw(9, 6, seed=8)  # [vocab, hidden]
    weight = small.weight("embed.weight", table)
    head = small.op("MatMul", small.x, small.op("Transpose", weight, perm=[1, 0]), name="lm_head")
    rows = small.op("Gather", weight, small.weight("ids", np.int64([3, 0, 3])))
    rows.shape = ir.Shape([3, 6])
    model = small.model(head, rows)
    pair = factors(6, 9, 2, seed=3)
    merge(model, find_sites(model, {"lm_head": Shape(6, 9)}), added({"lm_head": pair}))
    logits, embedded = run(model, X)
    np.testing.assert_allclose(logits, X @ _merged(np.ascontiguousarray(table.T), pair), atol=1e-5)
    np.testing.assert_array_equal(embedded, table[[3, 0, 3]])
    assert {"embed.weight", "lm_head.weight"} <= set(model.graph.initializers)


def test_two_layers_that_share_a_weight_get_one_each(run: Run) -> None:
    small = Small(6)
    weight = small.weight("first.weight", W)
    outputs = [small.op("MatMul", small.x, weight, name=name) for name in ("first", "second")]
    model = small.model(*outputs)
    pairs = {"first": PAIR, "second": factors(6, 5, 1, seed=30)}
    merge(model, find_sites(model, dict.fromkeys(pairs, Shape(6, 5))), added(pairs))
    for actual, pair in zip(run(model, X), pairs.values(), strict=True):
        np.testing.assert_allclose(actual, X @ _merged(W, pair), atol=1e-5)


def test_only_the_named_sites_change(run: Run) -> None:
    small = Small(6)
    other = draw(6, 5, seed=2)
    model = small.model(small.linear(small.x, "q", W), small.linear(small.x, "other", other))
    sites = find_sites(model, {**ONE, "other": Shape(6, 5)})
    merge(model, sites, added({"q": PAIR}))
    first, second = run(model, X)
    np.testing.assert_allclose(first, X @ _merged(W, PAIR), atol=1e-5)
    np.testing.assert_allclose(second, X @ other, atol=1e-6)


def test_a_parameter_that_the_graph_lacks_is_refused() -> None:
    small = Small(6)
    model = small.model(small.linear(small.x, "q", W))
    with pytest.raises(GraphError, match=r"k\.weight is not in the graph"):
        merge(model, find_sites(model, ONE), added({"k": PAIR}))
    tensor = model.graph.initializers["q.weight"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), W)
