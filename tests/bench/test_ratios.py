"""Ratios, their spread, and what is not judged, on figures whose answers are known."""

from __future__ import annotations

import math

import pytest

from lora_edge.bench.ratios import Ratio, compared, interval, ratio, reached, resolution


def test_a_ratio_is_of_each_process_and_its_mean_is_geometric() -> None:
    found = ratio([2.0, 8.0], [1.0, 1.0])
    assert found.value == pytest.approx(4.0)
    assert (found.smallest, found.largest, found.processes) == (2.0, 8.0, 2)
    # A machine that is ten times slower in one process changes nothing.
    slow = ratio([2.0, 80.0], [1.0, 10.0])
    assert slow == found


def test_the_interval_is_students_t_on_the_logarithms() -> None:
    # Logs -h, 0, h: deviation h, standard error h / √3, t of two degrees of freedom 4.303.
    h = 0.1
    found = ratio([math.exp(-h), 1.0, math.exp(h)], [1.0, 1.0, 1.0])
    half = 4.303 * h / math.sqrt(3)
    assert found.value == pytest.approx(1.0)
    assert found.low == pytest.approx(math.exp(-half))
    assert found.high == pytest.approx(math.exp(half))


def test_many_processes_narrow_it() -> None:
    few = ratio([1.0, 1.1] * 2, [1.0] * 4)
    many = ratio([1.0, 1.1] * 20, [1.0] * 40)
    assert few.high is not None
    assert many.high is not None
    assert many.high < few.high


def test_one_process_has_no_spread_and_resolves_nothing() -> None:
    one = ratio([3.0], [1.0])
    assert (one.low, one.high) == (None, None)
    assert resolution(one) is None
    assert interval(one, 0.01) is None
    assert compared(one, None) == "not resolved"
    assert reached(one, None, 2.0, least=True) == "not resolved"


@pytest.mark.parametrize(
    ("numerators", "denominators"),
    [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([1.0], [-1.0])],
)
def test_figures_that_have_no_ratio_are_refused(
    numerators: list[float], denominators: list[float]
) -> None:
    with pytest.raises(ValueError, match=r"figure"):
        ratio(numerators, denominators)


def _ratio(value: float, low: float, high: float) -> Ratio:
    return Ratio(value, low, high, low, high, 5)


def test_the_resolution_is_how_far_the_reference_reaches_from_itself() -> None:
    assert resolution(_ratio(1.0, 0.99, 1.03)) == pytest.approx(0.03)
    assert resolution(_ratio(1.0, 0.8, 1.03)) == pytest.approx(0.25)
    assert resolution(_ratio(1.05, 1.04, 1.06)) == pytest.approx(0.06)  # a bias counts


@pytest.mark.parametrize(
    ("measured", "resolved", "word"),
    [
        ((1.10, 1.08, 1.12), 0.02, "more"),
        ((0.90, 0.88, 0.92), 0.02, "less"),
        ((1.10, 1.08, 1.12), 0.11, "not resolved"),  # below what is resolved
        ((0.95, 0.94, 0.96), 0.06, "not resolved"),
        ((1.10, 0.99, 1.22), 0.001, "not resolved"),  # within its own spread
    ],
)
def test_differences_below_the_resolution_are_not_judged(
    measured: tuple[float, float, float], resolved: float, word: str
) -> None:
    assert compared(_ratio(*measured), resolved) == word


@pytest.mark.parametrize(
    ("value", "resolved", "least", "word"),
    [
        (0.99, 0.005, True, "reached"),
        (0.97, 0.03, True, "not resolved"),
        (0.90, 0.03, True, "missed"),
        (1.00, 0.0, True, "reached"),
        (1.05, 0.02, False, "reached"),
        (1.20, 0.02, False, "missed"),
        (1.09, 0.02, False, "not resolved"),
    ],
)
def test_a_target_is_reached_missed_or_not_resolved(
    value: float, resolved: float, least: bool, word: str
) -> None:
    target = 0.96 if least else 1.1
    measured = _ratio(value, value, value)
    assert reached(measured, resolved, target, least=least) == word


def test_what_is_counted_reaches_a_target_exactly() -> None:
    assert reached(_ratio(1.1, 1.1, 1.1), 0.0, 1.1, least=False) == "reached"
    assert reached(_ratio(1.11, 1.11, 1.11), 0.0, 1.1, least=False) == "missed"
