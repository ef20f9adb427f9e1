"""Outputs that are NaN or infinite are an error by name, never a token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lora_edge.errors import DataError
from lora_edge.runtime import Runner
from lora_edge.runtime.finite import finite
from lora_edge.runtime.sampling import Sampling


@pytest.fixture(scope="module")
def runner(bundles: dict[str, Any]) -> Runner:
    return Runner(bundles["fused"], threads=1)


@pytest.mark.parametrize("weight", [1e39, -1e300])
def test_a_weight_beyond_float32_is_refused(tiny: Any, runner: Runner, weight: float) -> None:
    name = runner.adapters[0]
    with pytest.raises(DataError, match="finite in float32") as caught:
        runner.logits(tiny.rows(4), adapter={name: weight})
    assert caught.value.hint


@pytest.mark.parametrize("weight", [1e38, -3e38])
def test_a_weight_that_overflows_is_no_answer(tiny: Any, runner: Runner, weight: float) -> None:
    blend = {runner.adapters[0]: weight}
    rows = tiny.rows(4, 6)
    with pytest.raises(DataError, match="not finite") as caught:
        runner.logits(rows, adapter=blend)
    assert "smaller weights" in caught.value.hint
    for sampling in ({}, {"temperature": 1.0, "seed": 0}):
        with pytest.raises(DataError, match="not finite"):
            list(runner.generate_ids(rows, adapter=blend, max_new_tokens=2, **sampling))
    # The same session goes on.
    assert np.isfinite(runner.logits(rows, adapter=runner.adapters[0])).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_no_token_is_chosen_from_what_is_no_number(bad: float, temperature: float) -> None:
    logits = np.full(5, bad if bad < 0 else 0.5, np.float32)
    logits[3] = bad
    with pytest.raises(DataError, match="not finite"):
        Sampling(temperature=temperature, seed=1).choose(logits, np.random.default_rng(0))


def test_minus_infinity_rules_a_token_out_and_no_more() -> None:
    logits = np.array([-np.inf, 2, 1], np.float32)
    assert Sampling().choose(logits, np.random.default_rng(0)) == 1


def test_finite_gives_back_what_it_got() -> None:
    values = np.arange(3, dtype=np.float32)
    assert finite(values) is values
    with pytest.raises(DataError, match="not finite"):
        finite(np.array([1, np.nan], np.float32))
