"""Pooling: each way against a loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lora_edge.maths.pooling import MODES, Pooling

HIDDEN = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float32)
LENGTHS = (5, 2, 1)
MASK = np.array([[1] * n + [0] * (5 - n) for n in LENGTHS])
ROWS = [row[:n].astype(np.float64) for row, n in zip(HIDDEN, LENGTHS, strict=True)]
WAYS = {
    "mean": lambda row: row.mean(0),
    "cls": lambda row: row[0],
    "max": lambda row: row.max(0),
    "lasttoken": lambda row: row[-1],
    "mean_sqrt_len_tokens": lambda row: row.sum(0) / len(row) ** 0.5,
    "weightedmean": lambda row: np.average(row, 0, np.arange(1, len(row) + 1)),
}


def _found(mode: Any, **settings: Any) -> Any:
    return Pooling((mode,), **settings)(HIDDEN, MASK)


def test_every_way_is_tried() -> None:
    assert set(WAYS) == set(MODES)


@pytest.mark.parametrize("mode", WAYS)
def test_each_way_sees_the_rows_own_tokens_only(mode: Any) -> None:
    wanted = np.stack([WAYS[mode](row) for row in ROWS])
    found = _found(mode)
    assert (found.shape, found.dtype) == ((3, 4), np.float32)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    others = [np.abs(found - _found(other)).max() for other in set(WAYS) - {mode}]
    assert min(others) > 0.1
    normal = _found(mode, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(normal, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(
        normal, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-6
    )


def test_several_ways_stand_side_by_side_in_their_order() -> None:
    both = Pooling(("max", "cls"))(HIDDEN, MASK)
    np.testing.assert_array_equal(both, np.hstack([_found("max"), _found("cls")]))


@pytest.mark.parametrize("mode", sorted(set(WAYS) - {"weightedmean"}))
def test_a_prompt_that_does_not_count(mode: Any) -> None:
    found = Pooling((mode,), include_prompt=False)(HIDDEN[:2], MASK[:2], 1)
    wanted = np.stack([WAYS[mode](row[1:]) for row in ROWS[:2]])
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_array_equal(Pooling((mode,))(HIDDEN, MASK, 1), _found(mode))


def test_the_weights_of_a_weighted_mean_begin_at_the_prompt() -> None:
    found = Pooling(("weightedmean",), include_prompt=False)(HIDDEN[:1], MASK[:1], 2)
    np.testing.assert_allclose(found[0], np.average(ROWS[0][2:], 0, [3, 4, 5]), atol=1e-6)
