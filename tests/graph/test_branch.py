"""Branches, run on ONNX Runtime against numpy: whole, packed, gated by row and by token, off."""

from __future__ import annotations

import numpy as np
import pytest

from lora_edge.errors import GraphError
from lora_edge.graph import branch, find_sites
from lora_edge.maths.lora import Factors, zeros
from tests.support.small_graphs import BATCH, SEQ, Run, Shape, Small, draw, factors, lora_feeds

X = draw(BATCH, SEQ, 6, seed=42)


def _two_layers() -> tuple[Small, np.ndarray, np.ndarray]:
    """The second layer reads the first, so a branch on one must reach the other."""
    small = Small(6)
    up, down = draw(6, 5, seed=1), draw(5, 4, seed=2)
    small.linear(small.op("Tanh", small.linear(small.x, "up", up)), "down", down)
    return small, up, down


SHAPES = {"up": Shape(6, 5), "down": Shape(5, 4)}
PAIRS = {"up": factors(6, 5, 3, seed=10), "down": factors(5, 4, 2, seed=20)}


def _expected(up: np.ndarray, down: np.ndarray, gates: dict[str, np.ndarray]) -> np.ndarray:
    """In float64."""

    def layer(x: np.ndarray, weight: np.ndarray, path: str) -> np.ndarray:
        pair = PAIRS[path]
        return x @ weight + ((x @ pair.A.astype(np.float64)) * gates[path]) @ pair.B

    return layer(np.tanh(layer(X.astype(np.float64), up, "up")), down, "down")


@pytest.mark.parametrize("order", [["up", "down"], ["down", "up"]])
@pytest.mark.parametrize("shape", [(1, 1, 1), (BATCH, 1, 1), (1, SEQ, 1), (BATCH, SEQ, 0)])
def test_both_branches_and_every_shape_of_gate(
    shape: tuple[int, ...], order: list[str], run: Run
) -> None:
    """A last dimension of 0 stands for the site's own rank."""
    small, up, down = _two_layers()
    model = small.model(small.nodes[-1].outputs[0])
    sites = find_sites(model, SHAPES)
    branch(model, {path: sites[path] for path in order})
    gates = {
        path: draw(*shape[:2], shape[2] or pair.rank, seed=len(path))
        for path, pair in PAIRS.items()
    }
    feeds = lora_feeds(PAIRS) | {f"lora.{path}.gate": gate for path, gate in gates.items()}
    (actual,) = run(model, X, feeds)
    np.testing.assert_allclose(actual, _expected(up, down, gates), atol=1e-5)
    off = _expected(up, down, {path: np.zeros(1) for path in PAIRS})
    assert np.abs(actual - off).max() > 0.1


@pytest.mark.parametrize("rank", [0, 1])
def test_switched_off_is_the_base_bit_for_bit(rank: int, run: Run) -> None:
    small, _, _ = _two_layers()
    (bare,) = run(small.model(small.nodes[-1].outputs[0]), X)
    small, _, _ = _two_layers()
    model = small.model(small.nodes[-1].outputs[0])
    branch(model, find_sites(model, SHAPES))
    none = {path: zeros(s.in_features, s.out_features, rank) for path, s in SHAPES.items()}
    np.testing.assert_array_equal(run(model, X, lora_feeds(none))[0], bare)
    assert np.abs(run(model, X, lora_feeds(PAIRS))[0] - bare).max() > 0.1


def test_every_input_is_pure_and_its_symbols_are_its_own(run: Run) -> None:
    small, _, _ = _two_layers()
    model = small.model(small.nodes[-1].outputs[0])
    branch(model, find_sites(model, SHAPES))
    own = [value for value in model.graph.inputs if str(value.name).startswith("lora.")]
    assert len(own) == 6
    assert not any(value.is_initializer() for value in own)
    symbols = [str(dim) for value in own for dim in value.shape or () if not isinstance(dim, int)]
    shared = {f"lora.{path}.A.rank" for path in SHAPES}  # A's columns are B's rows
    assert {name for name in symbols if symbols.count(name) > 1} == shared
    feeds = lora_feeds(PAIRS)
    del feeds["lora.up.B"]
    with pytest.raises(ValueError, match=r"lora\.up\.B"):
        run(model, X, feeds)


def test_the_output_keeps_its_name(run: Run) -> None:
    small = Small(6)
    model = small.model(small.linear(small.x, "up", draw(6, 5)))
    branch(model, find_sites(model, {"up": Shape(6, 5)}))
    assert [value.name for value in model.graph.outputs] == ["y0"]
    pairs = {"up": PAIRS["up"]}
    (actual,) = run(model, X, lora_feeds(pairs))
    np.testing.assert_allclose(
        actual, X @ draw(6, 5) + X @ pairs["up"].A @ pairs["up"].B, atol=1e-5
    )


Q, K, V = (draw(6, n, seed=n) for n in (5, 3, 4))
PACKED = {"a.q": Shape(6, 5), "a.k": Shape(6, 3), "a.v": Shape(6, 4)}


def _packed(*, transposed: bool) -> Small:
    small = Small(6)
    whole = np.concatenate([Q, K, V], axis=1)
    if transposed:
        weight = small.weight("w", np.ascontiguousarray(whole.T))
        small.flattened(small.x, "qkv", weight, transB=1)
    else:
        small.linear(small.x, "qkv", whole)
    return small


@pytest.mark.parametrize("transposed", [False, True])
def test_packed_projections_get_their_deltas_by_slice(transposed: bool, run: Run) -> None:
    """One of them with rank 0; given in another order than they lie in."""
    small = _packed(transposed=transposed)
    model = small.model(small.nodes[-1].outputs[0])
    weights = {f"a.{name}.weight": x.T.copy() for name, x in (("q", Q), ("k", K), ("v", V))}
    sites = find_sites(model, PACKED, weights.get)
    branch(model, dict(reversed(sites.items())))
    pairs = {"a.q": factors(6, 5, 2), "a.k": zeros(6, 3, 0), "a.v": factors(6, 4, 3, seed=5)}
    gate = np.float32([[[1.0]], [[-0.5]]])
    (actual,) = run(model, X, lora_feeds(pairs, gate))
    expected = [
        X @ weight + (X @ pair.A) * gate @ pair.B
        for weight, pair in zip((Q, K, V), pairs.values(), strict=True)
    ]
    np.testing.assert_allclose(actual, np.concatenate(expected, axis=-1), atol=1e-5)
    swapped = {"a.q": pairs["a.q"], "a.k": factors(6, 3, 1), "a.v": pairs["a.v"]}
    (other,) = run(model, X, lora_feeds(swapped, gate))
    changed = np.abs(other - actual).max((0, 1)) > 1e-3
    assert changed.tolist() == [False] * 5 + [True] * 3 + [False] * 4


@pytest.mark.parametrize("left_out", ["a.q", "a.k", "a.v"])
def test_a_packed_node_with_a_column_uncovered_is_refused(left_out: str) -> None:
    small = _packed(transposed=False)
    model = small.model(small.nodes[-1].outputs[0])
    weights = {f"a.{name}.weight": x.T.copy() for name, x in (("q", Q), ("k", K), ("v", V))}
    sites = find_sites(model, PACKED, weights.get)
    del sites[left_out]
    with pytest.raises(GraphError, match="are no site") as caught:
        branch(model, sites)
    assert "all layers" in caught.value.hint


def test_the_weights_are_not_touched() -> None:
    small, up, down = _two_layers()
    model = small.model(small.nodes[-1].outputs[0])
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    branch(model, find_sites(model, SHAPES))
    after = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert before == after
    assert isinstance(PAIRS["up"], Factors)
    for values, name in ((up, "up.weight"), (down, "down.weight")):
        tensor = after[name]
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), values)
