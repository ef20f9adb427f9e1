from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lora_edge.errors import DataError
from lora_edge.runtime.sampling import Sampling

LOGITS = np.log(np.float32([0.4, 0.3, 0.2, 0.1]))


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max())
    return e / e.sum()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1.0}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, softmax(2 * LOGITS)),
        ({"temperature": 1.0, "top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 1.0, "top_k": 9}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 1.0, "top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"temperature": 1.0, "top_p": 0.01}, [1, 0, 0, 0]),
        # top-p counts what top-k has left: 4/7 alone is enough for 0.5.
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.5}, [1, 0, 0, 0]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
    ],
)
def test_probabilities(options: dict[str, Any], expected: Any) -> None:
    np.testing.assert_allclose(Sampling(**options).probabilities(LOGITS), expected, atol=1e-7)


def test_the_order_of_the_vocabulary_does_not_matter() -> None:
    order = np.array([2, 0, 3, 1])
    sampling = Sampling(temperature=0.7, top_k=3, top_p=0.9)
    one, two = sampling.probabilities(LOGITS), sampling.probabilities(LOGITS[order])
    np.testing.assert_allclose(one[order], two)


def test_samples_follow_the_distribution() -> None:
    sampling = Sampling(temperature=0.8, top_k=3, seed=5)
    generator = sampling.generators([[1]])[0]
    draws = 20_000
    counts = np.bincount([sampling.choose(LOGITS, generator) for _ in range(draws)], minlength=4)
    expected = sampling.probabilities(LOGITS) * draws
    assert counts[3] == 0
    chi2 = ((counts - expected)[:3] ** 2 / expected[:3]).sum()
    assert chi2 < 13.8  # two degrees of freedom, p = 0.001
    other = Sampling(temperature=1.0, top_k=3).probabilities(LOGITS) * draws
    assert ((counts - other)[:3] ** 2 / other[:3]).sum() > 13.8


def test_greedy_takes_the_first_of_equals() -> None:
    generator = np.random.default_rng(0)
    assert Sampling().choose(np.float32([1, 3, 3, 2]), generator) == 1


def test_generators_depend_on_seed_prompt_and_repetition_only() -> None:
    def first(sampling: Sampling, prompts: list[list[int]]) -> list[float]:
        return [generator.random() for generator in sampling.generators(prompts)]

    one = first(Sampling(seed=1), [[1, 2], [3], [1, 2]])
    assert one[:2] == first(Sampling(seed=1), [[1, 2], [3]])
    assert one[1:2] == first(Sampling(seed=1), [[3]])
    assert one[0] != one[2]
    assert one != first(Sampling(seed=2), [[1, 2], [3], [1, 2]])
    assert first(Sampling(), [[1]]) != first(Sampling(), [[1]])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("seed", -1),
    ],
)
def test_bad_settings_are_named(name: str, value: float) -> None:
    with pytest.raises(DataError, match=f"{name} is {value}, expected"):
        Sampling(**{name: value})  # type: ignore[arg-type]
