from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lora_edge.errors import DataError, OptionError
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


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8, "temperature": 0.7},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"top_k": 50, "top_p": 0.8, "min_p": 0.02, "temperature": 0.6, "repetition_penalty": 1.1},
        {"top_k": 20, "top_p": 0.95, "temperature": 1.5},
        {"top_k": 3},
    ],
)
def test_probabilities_are_those_of_transformers_processors(
    options: dict[str, Any], seed: int
) -> None:
    import torch
    from transformers import GenerationConfig
    from transformers.generation import logits_process as made

    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(300) * 4).astype(np.float32)
    logits[rng.integers(0, 300, 40)] = logits[7]  # equals, which top-k keeps together
    history = rng.integers(0, 300, 60).tolist()
    config = GenerationConfig(do_sample=True, **options)
    chain = made.LogitsProcessorList()
    if config.repetition_penalty is not None:
        chain.append(made.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.temperature is not None:
        chain.append(made.TemperatureLogitsWarper(config.temperature))
    if options.get("top_k"):
        chain.append(made.TopKLogitsWarper(options["top_k"]))
    if options.get("top_p"):
        chain.append(made.TopPLogitsWarper(options["top_p"]))
    if options.get("min_p") is not None:
        chain.append(made.MinPLogitsWarper(options["min_p"]))
    scores = chain(torch.tensor([history]), torch.from_numpy(logits.copy())[None])
    expected = torch.softmax(scores[0].double(), 0).numpy()
    found = Sampling(**{"temperature": 1.0, **options}).probabilities(logits, set(history))
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)


def test_the_repetition_penalty_changes_what_is_greedy() -> None:
    logits, generator = np.float32([1.0, 3.0, 2.0, -1.0]), np.random.default_rng(0)
    assert Sampling(repetition_penalty=2.0).choose(logits, generator, {1}) == 2
    assert Sampling(repetition_penalty=2.0).choose(logits, generator, {2}) == 1
    assert Sampling(repetition_penalty=2.0).penalized(logits, {3})[3] == -2.0
    assert logits.tolist() == [1.0, 3.0, 2.0, -1.0]


@pytest.mark.parametrize(
    "bad",
    [
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_p": float("nan")},
    ],
)
def test_values_outside_their_ranges(bad: dict[str, float]) -> None:
    with pytest.raises(DataError, match=f"{next(iter(bad))} is "):
        Sampling(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": "1"},
        {"top_k": 2.5},
        {"top_p": None},
        {"seed": 1.5},
        {"min_p": [1]},
        {"top_k": True},
    ],
)
def test_values_of_other_types(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(bad))} is "):
        Sampling(**bad)
