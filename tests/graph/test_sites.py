"""Sites are found by content, whatever the layout and the names; what is ambiguous is refused."""

from __future__ import annotations

import numpy as np
import pytest

from lora_edge.errors import GraphError
from lora_edge.graph import find_sites
from tests.support.small_graphs import Shape, Small, draw

Q, K, V = (draw(n, 6, seed=n) for n in (5, 3, 4))  # the checkpoint's: [out, in]
PACKED = {"a.q": Shape(6, 5), "a.k": Shape(6, 3), "a.v": Shape(6, 4)}
CHECKPOINT = {"a.q.weight": Q, "a.k.weight": K, "a.v.weight": V}


def _packed(*, transposed: bool = False) -> Small:
    small = Small(6)
    whole = np.concatenate([Q, K, V])
    if transposed:
        weight = small.op("Transpose", small.weight("w", whole), perm=[1, 0])
    else:
        weight = small.weight("w", np.ascontiguousarray(whole.T))
    small.op("MatMul", small.x, weight, name="anything")
    return small


@pytest.mark.parametrize("transposed", [False, True])
def test_packed_projections_are_slices_of_one_node(transposed: bool) -> None:
    small = _packed(transposed=transposed)
    model = small.model(small.nodes[-1].outputs[0])
    sites = find_sites(model, PACKED, CHECKPOINT.get)
    assert list(sites) == ["a.q", "a.k", "a.v"]
    assert [(site.start, site.out_features) for site in sites.values()] == [(0, 5), (5, 3), (8, 4)]
    for site in sites.values():
        assert (site.width, site.transposed) == (12, transposed)
        assert site.node.name == "anything"
        assert site.x is small.x
        assert site.weight.name == "w"


def test_a_checkpoint_that_stores_in_by_out_is_found_too() -> None:
    small = Small(6)
    model = small.model(small.linear(small.x, "conv1d", np.ascontiguousarray(Q.T)))
    site = find_sites(model, {"a.q": Shape(6, 5)}, {"a.q.weight": np.ascontiguousarray(Q.T)}.get)[
        "a.q"
    ]
    assert (site.start, site.transposed) == (0, False)


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_between_reshapes_takes_its_branch_around_them(transposed: int) -> None:
    small = Small(6)
    weight = small.weight("w", Q if transposed else np.ascontiguousarray(Q.T))
    attributes = {"transB": 1} if transposed else {}
    y = small.flattened(small.x, "g", weight, **attributes)
    site = find_sites(small.model(y), {"a.q": Shape(6, 5)}, CHECKPOINT.get)["a.q"]
    assert site.y is y
    assert site.x is small.x
    assert site.transposed == bool(transposed)


def test_a_node_with_the_modules_name_needs_no_weights() -> None:
    small = Small(6)
    model = small.model(small.linear(small.x, "a.q", np.zeros((6, 5), np.float32)))
    assert find_sites(model, {"a.q": Shape(6, 5)})["a.q"].node.name == "a.q"
    with pytest.raises(GraphError, match=r"no node for a\.k") as caught:
        find_sites(model, {"a.k": Shape(6, 3)})
    assert "base" in caught.value.hint
    # The right name with other sizes is another layer.
    with pytest.raises(GraphError, match=r"no node for a\.q"):
        find_sites(model, {"a.q": Shape(6, 4)})


def test_equal_weights_are_told_apart_by_name_or_refused() -> None:
    small = Small(6)
    same = np.ascontiguousarray(Q.T)
    first = small.linear(small.x, "/layers.0/q/MatMul", same)
    second = small.linear(small.x, "/layers.1/q/MatMul", same)
    model = small.model(first, second)
    shapes = {"layers.0.q": Shape(6, 5), "layers.1.q": Shape(6, 5)}
    sites = find_sites(model, shapes, lambda _: Q)
    assert [site.y for site in sites.values()] == [first, second]
    for node, name in zip(model.graph, ("n1", "n2"), strict=True):
        node.name = name
    with pytest.raises(GraphError, match=r"layers\.0\.q cannot be told apart.*n1, n2") as caught:
        find_sites(model, shapes, lambda _: Q)
    assert caught.value.hint


def test_a_weight_that_the_graph_does_not_have() -> None:
    small = _packed()
    model = small.model(small.nodes[-1].outputs[0])
    nudged = np.nextafter(Q, np.float32(np.inf))
    with pytest.raises(GraphError, match=r"a\.q.*in no node"):
        find_sites(model, {"a.q": Shape(6, 5)}, lambda _: nudged)
    with pytest.raises(GraphError, match=r"no weight for a\.q"):
        find_sites(model, {"a.q": Shape(6, 5)}, lambda _: None)
    # Columns of two layers that lie side by side are no layer.
    shifted = np.concatenate([Q, K])[2:7]
    assert find_sites(model, {"a.s": Shape(6, 5)}, lambda _: shifted)["a.s"].start == 2
    with pytest.raises(GraphError, match="in no node"):
        find_sites(model, {"a.s": Shape(6, 5)}, lambda _: shifted[::-1].copy())


@pytest.mark.parametrize("attributes", [{"alpha": 2.0}, {"beta": 0.5}, {"transA": 1}])
def test_a_gemm_that_does_more_than_multiply_is_no_site(attributes: dict[str, object]) -> None:
    """Its output is not x @ W + b, so a delta could not simply be added."""
    small = Small(6)
    weight = small.weight("w", np.ascontiguousarray(Q.T))
    y = small.flattened(small.x, "g", weight, **attributes)  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="in no node"):
        find_sites(small.model(y), {"a.q": Shape(6, 5)}, CHECKPOINT.get)


def test_a_layer_on_flattened_tokens_is_refused_by_name() -> None:
    """As optimum's graph of OPT: a row gate would broadcast [batch * seq, R] in silence."""
    small = Small(6)
    flat = small.op("Reshape", small.x, small.weight("flat", np.int64([-1, 6])))
    inner = small.op("Gemm", flat, small.weight("w1", np.ascontiguousarray(Q.T)), name="fc1")
    active = small.op("Relu", inner)
    outer = small.op("Gemm", active, small.weight("w2", draw(5, 6, seed=9)), name="fc2")
    back = small.op("Reshape", outer, small.weight("back", np.int64([2, 3, 6])))
    with pytest.raises(GraphError, match=r"layers\.0\.fc1.*takes a branch") as caught:
        find_sites(small.model(back), {"layers.0.fc1": Shape(6, 5)}, lambda _: Q)
    assert "flattened tokens" in caught.value.hint
    assert "--backend trace" in caught.value.hint
