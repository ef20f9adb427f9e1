"""Figures and verdicts on made-up logits; each rule has a case that it must catch."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lora_edge.files import spilled
from lora_edge.parity.compare import (
    Expected,
    FloatArray,
    Floor,
    Tolerance,
    Verdict,
    expect,
    judge,
    limits,
    measure,
    noise,
)

FLOOR = Floor(1e-6, 3e-7)
TOLERANCE = Tolerance()


@pytest.fixture
def base() -> FloatArray:
    return np.random.default_rng(0).normal(0, 3, (7, 29)).astype(np.float32)


@pytest.fixture
def reference(base: FloatArray) -> FloatArray:
    return base + np.random.default_rng(1).normal(0, 1, base.shape).astype(np.float32)


def _verdict(expected: Expected, actual: FloatArray, floor: Floor = FLOOR) -> Verdict:
    has_effect = expected.base is not None
    figures = measure([expected], [actual], floor, TOLERANCE)
    limit = limits(figures, floor, TOLERANCE, has_effect=has_effect)
    return judge("adapter a", figures, limit, TOLERANCE, has_effect=has_effect)


def test_figures_are_what_their_formulas_say(base: FloatArray, reference: FloatArray) -> None:
    actual = reference + np.float32(0.25) * (reference - base)
    figures = measure([expect(reference, base)], [actual], FLOOR, TOLERANCE)
    effect = (reference - base).astype(np.float64)
    assert figures.positions == 7
    assert figures.effect_error == pytest.approx(0.25, rel=1e-5)
    assert figures.gain == pytest.approx(1.25, rel=1e-5)
    assert figures.logit_error == pytest.approx(0.25 * np.abs(effect).max(), rel=1e-4)
    assert figures.effect_max == pytest.approx(np.abs(effect).max(), rel=1e-6)
    assert figures.effect_rms == pytest.approx(math.sqrt((effect**2).mean()), rel=1e-6)
    p = np.exp(reference.astype(np.float64))
    q = np.exp(actual.astype(np.float64))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    assert figures.kl == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-6)


def test_rows_of_unequal_lengths_are_pooled(base: FloatArray, reference: FloatArray) -> None:
    whole = expect(reference, base)
    parts = [whole.first(3), expect(reference[3:], base[3:])]
    actual = reference + np.float32(0.01)
    once = measure([whole], [actual], FLOOR, TOLERANCE)
    split = measure(parts, [actual[:3], actual[3:]], FLOOR, TOLERANCE)
    assert vars(split) == pytest.approx(vars(once))


def test_exact_outputs_pass(base: FloatArray, reference: FloatArray) -> None:
    assert _verdict(expect(reference, base), reference).status == "passed"
    assert _verdict(expect(base), base).status == "passed"


def test_errors_beyond_the_limit_fail(base: FloatArray, reference: FloatArray) -> None:
    one_off = reference.copy()
    one_off[4, 11] += 2e-5
    verdict = _verdict(expect(reference, base), one_off)
    assert verdict.status == "failed"
    assert "adapter a" in verdict.reason
    assert "exceeds the limit 1.0e-05 (floor 1.0e-06)" in verdict.reason


def test_many_small_errors_fail_by_the_effect(base: FloatArray, reference: FloatArray) -> None:
    """Each logit is within its limit; all of them together are not noise."""
    verdict = _verdict(expect(reference, base), reference + np.float32(9e-6))
    assert verdict.status == "failed"
    assert "effect-relative error" in verdict.reason


def test_an_adapter_that_does_nothing_fails(base: FloatArray, reference: FloatArray) -> None:
    verdict = _verdict(expect(reference, base), base)
    assert verdict.status == "failed"
    assert "it has 0.00 times PyTorch's effect" in verdict.reason


def test_no_effect_is_unproved(base: FloatArray) -> None:
    verdict = _verdict(expect(base, base), base)
    assert verdict.status == "unproved"
    assert "no effect" in verdict.reason


def test_an_effect_that_the_reference_lacks_fails(base: FloatArray, reference: FloatArray) -> None:
    assert _verdict(expect(base, base), reference).status == "failed"


def test_a_weak_effect_is_unproved(base: FloatArray, reference: FloatArray) -> None:
    """Effect 1e-3, floor 3e-6: too close to notice that a hundredth of the adapter is missing."""
    weak = base + np.float32(1e-3) * (reference - base)
    verdict = _verdict(expect(weak, base), weak, Floor(1e-5, 3e-6))
    assert verdict.status == "unproved"
    assert "not far below the effect" in verdict.reason


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_fail(base: FloatArray, reference: FloatArray, bad: float) -> None:
    actual = reference.copy()
    actual[2, 3] = bad
    with np.errstate(invalid="ignore", over="ignore"):
        assert _verdict(expect(reference, base), actual).status == "failed"


@pytest.mark.parametrize(("margin", "differences", "ties"), [(1e-2, 1, 0), (1e-6, 0, 1)])
def test_another_token_counts_beyond_the_margin(margin: float, differences: int, ties: int) -> None:
    reference = np.zeros((1, 5), np.float32)
    reference[0, 2] = margin
    actual = reference.copy()
    actual[0, 4] = 2 * margin
    figures = measure([expect(reference)], [actual], FLOOR, TOLERANCE)
    assert (figures.token_differences, figures.token_ties) == (differences, ties)
    assert figures.top1 == 0


def test_noise_is_never_zero(base: FloatArray) -> None:
    floor = noise([base], [base.astype(np.float64)])
    assert floor.logit == pytest.approx(np.abs(base).max() * 2**-23)
    assert floor.rms > 0
    wide = base.astype(np.float64) + 1e-3
    assert noise([base], [wide]).logit == pytest.approx(1e-3)


def test_outputs_in_files_have_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: where an array is, is no affair of what is computed."""
    random = np.random.default_rng(0)
    base = random.normal(0, 3, (90, 7001)).astype(np.float32)
    reference, actual = (base + random.normal(0, 1, base.shape).astype(np.float32) for _ in "ab")
    wide = reference + random.normal(0, 1e-6, base.shape)
    actual[3, 5] = base[3].max() + 9
    plain = [expect(reference, base), expect(reference)]
    floor = noise([reference], [wide])
    figures = [measure([x], [actual], floor, TOLERANCE) for x in plain]
    monkeypatch.setattr(spilled, "LEAST", 1)
    base, reference, actual, wide = map(spilled.moved, (base, reference, actual, wide))
    found = [expect(reference, base), expect(reference)]
    assert noise([reference], [wide]) == floor
    # nan, the gain without an adapter, is not itself
    assert repr([measure([x], [actual], floor, TOLERANCE) for x in found]) == repr(figures)
    for one, other in zip(found, plain, strict=True):
        for name in ("reference", "log_total", "top1", "margin"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
            assert getattr(one, name).dtype == getattr(other, name).dtype, name
