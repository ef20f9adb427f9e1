"""The maths of LoRA against its formulas, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_edge.maths.lora import Factors, concatenate, delta, fold, row_gate, scaling, zeros

RANDOM = np.random.default_rng(0)


def _pair(rank: int, in_features: int = 7, out_features: int = 5) -> Factors:
    a, b = RANDOM.normal(size=(in_features, rank)), RANDOM.normal(size=(rank, out_features))
    return Factors(a.astype(np.float32), b.astype(np.float32))


def test_scaling() -> None:
    assert scaling(16, 8, rslora=False) == 2.0
    assert scaling(16, 16, rslora=True) == 4.0
    assert scaling(9, 3, rslora=True) == pytest.approx(9 / math.sqrt(3))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_folding_turns_both_and_scales_b_alone(dtype: type[np.floating]) -> None:
    a, b = RANDOM.normal(size=(3, 7)).astype(dtype), RANDOM.normal(size=(5, 3)).astype(dtype)
    pair = fold(a, b, 2.5)
    assert (pair.A.shape, pair.B.shape, pair.rank) == ((7, 3), (3, 5), 3)
    assert pair.A.dtype == pair.B.dtype == np.float32
    assert pair.A.flags["C_CONTIGUOUS"]
    assert pair.B.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(pair.A, a.T.astype(np.float32))
    np.testing.assert_allclose(delta(pair).T, 2.5 * (b @ a).astype(np.float64), atol=1e-2)
    np.testing.assert_array_equal(pair.B, b.T.astype(np.float32) * np.float32(2.5))


def test_a_delta_is_wide() -> None:
    """In float32 the two terms would cancel to another value."""
    pair = Factors(np.float32([[1e8, 1, -1e8]]), np.float32([[1], [1], [1]]))
    assert delta(pair).dtype == np.float64
    assert delta(pair).item() == 1.0


@given(ranks=st.lists(st.integers(0, 6), min_size=1, max_size=4), data=st.data())
def test_a_concatenation_is_the_weighted_sum_of_deltas(
    ranks: list[int], data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.floats(-2, 2), min_size=len(ranks), max_size=len(ranks)))
    parts = [(_pair(rank), weight) for rank, weight in zip(ranks, weights, strict=True)]
    together = concatenate(parts)
    assert together.rank == sum(ranks)
    expected = sum(weight * delta(pair) for pair, weight in parts)
    np.testing.assert_allclose(delta(together), expected, atol=1e-5)


def test_a_row_gate_gives_each_row_its_own_sum() -> None:
    """With adapters of ranks 2, 0 and 3 side by side, one of them absent from a row."""
    ranks = [2, 0, 3]
    pairs = [_pair(rank) for rank in ranks]
    weights = np.array([[1, 0, 0], [0, 1, 0.5], [0.25, 1, -1]])
    gate = row_gate(ranks, weights[:, None, :])
    assert (gate.shape, gate.dtype) == ((3, 1, 5), np.float32)
    together = concatenate([(pair, 1.0) for pair in pairs])
    x = RANDOM.normal(size=(3, 4, 7))
    actual = ((x @ together.A) * gate) @ together.B
    for row in range(3):
        own = sum(w * delta(pair) for w, pair in zip(weights[row], pairs, strict=True))
        np.testing.assert_allclose(actual[row], x[row] @ own, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_zeros_change_nothing(rank: int) -> None:
    pair = zeros(7, 5, rank)
    assert (pair.A.shape, pair.B.shape) == ((7, rank), (rank, 5))
    assert pair.A.dtype == pair.B.dtype == np.float32
    np.testing.assert_array_equal(delta(pair), np.zeros((7, 5)))
