"""generation_config.json is followed as transformers' generate follows it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from lora_edge.errors import BundleError, DataError, OptionError
from lora_edge.runtime import Runner
from lora_edge.runtime.sampling import Sampling
from lora_edge.runtime.text.defaults import read_defaults


def _read(tmp_path: Path, generation: Any = None, config: Any = None) -> Any:
    for name, data in (("generation_config.json", generation), ("config.json", config)):
        if data is not None:
            (tmp_path / name).write_text(data if isinstance(data, str) else json.dumps(data))
    return read_defaults(tmp_path)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, Sampling()),
        ({"temperature": 0.6, "top_p": 0.9}, Sampling()),  # no effect without do_sample
        ({"do_sample": True}, Sampling(1.0, 50, 1.0)),  # transformers' own top_k
        ({"do_sample": True, "top_k": 0}, Sampling(1.0, 0, 1.0)),
        ({"do_sample": True, "top_k": None, "temperature": None}, Sampling(1.0, 50, 1.0)),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1},
            Sampling(0.6, 20, 0.95, min_p=0.1),
        ),
        ({"repetition_penalty": 1.1}, Sampling(repetition_penalty=1.1)),
        (
            {"do_sample": True, "repetition_penalty": 1.05, "top_k": 1},
            Sampling(1.0, 1, 1.0, repetition_penalty=1.05),
        ),
    ],
)
def test_sampling(tmp_path: Path, generation: dict[str, Any], expected: Sampling) -> None:
    assert _read(tmp_path, generation).sampling == expected


def test_a_config_of_old_holds_the_defaults_where_there_is_no_other(tmp_path: Path) -> None:
    found = _read(tmp_path, None, {"do_sample": True, "temperature": 0.5, "eos_token_id": [1, 2]})
    assert found.sampling == Sampling(0.5, 50, 1.0)
    assert found.eos_ids == {1, 2}
    assert _read(tmp_path, {}, {"do_sample": True, "eos_token_id": 1}).sampling == Sampling()


def test_the_files_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    given = {
        "do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.01,
        "repetition_penalty": 1.2, "eos_token_id": [3, 4], "max_new_tokens": 7,
    }  # fmt: skip
    found = _read(tmp_path, given)
    theirs = GenerationConfig.from_pretrained(tmp_path)
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        assert getattr(found.sampling, name) == getattr(theirs, name)
    assert found.eos_ids == set(theirs.eos_token_id)
    assert found.max_new_tokens == theirs.max_new_tokens
    assert found.not_followed == ()


def test_what_is_not_followed_is_named(tmp_path: Path) -> None:
    given = {
        "num_beams": 4,
        "no_repeat_ngram_size": 3,
        "length_penalty": 2.0,
        "suppress_tokens": [1],
    }
    assert set(_read(tmp_path, given).not_followed) == {
        "num_beams=4", "no_repeat_ngram_size=3", "length_penalty=2.0", "suppress_tokens=[1]",
    }  # fmt: skip
    neutral = {
        "num_beams": 1, "typical_p": 1.0, "max_length": 20, "length_penalty": 2.0,
        "bos_token_id": 1, "pad_token_id": 0, "transformers_version": "5", "use_cache": True,
    }  # fmt: skip
    assert _read(tmp_path, neutral).not_followed == ()


@pytest.mark.parametrize(
    "bad",
    [
        {"eos_token_id": [[]]},
        {"eos_token_id": {"a": 1}},
        {"eos_token_id": "2"},
        {"eos_token_id": [True]},
        {"eos_token_id": 1.5},
        {"do_sample": True, "temperature": "hot"},
        {"do_sample": True, "temperature": -1},
        {"do_sample": True, "top_k": 1.5},
        {"do_sample": True, "top_p": 2},
        {"do_sample": True, "min_p": []},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("nan")},
        {"max_new_tokens": -5},
        "[]",
        "{",
        "[" * 100_000,
    ],
)
def test_values_that_are_none_are_refused(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(BundleError) as refused:
        _read(tmp_path, bad)
    assert refused.value.hint
    assert len(str(refused.value)) < 600


@pytest.fixture
def runner(tiny: Any, tmp_path: Path) -> Any:
    bundle = tiny.bundle(tmp_path / "model", "fused")

    def make(**given: Any) -> Runner:
        path = bundle.directory / "generation_config.json"
        path.write_text(json.dumps({"eos_token_id": [tiny.eos], **given}))
        return Runner(tiny.rehash(bundle, "generation_config.json"))

    return make


def test_generate_follows_the_model_when_asked_to(runner: Any) -> None:
    asked: dict[str, Any] = {"do_sample": True, "temperature": 2.5, "top_k": 7, "max_new_tokens": 9}
    made = runner(**asked, repetition_penalty=1.4)
    own = made.generate_ids([[1, 2, 3]], seed=3, defaults="model")
    said = {"temperature": 2.5, "top_k": 7, "repetition_penalty": 1.4, "max_new_tokens": 9}
    assert own == made.generate_ids([[1, 2, 3]], seed=3, **said)
    assert own != made.generate_ids([[1, 2, 3]], seed=3, max_new_tokens=9)
    # What is given comes first.
    greedy = made.generate_ids([[1, 2, 3]], defaults="model", temperature=0, max_new_tokens=5)
    assert greedy == made.generate_ids([[1, 2, 3]], repetition_penalty=1.4, max_new_tokens=5)
    texts = made.generate("hi", seed=3, defaults="model", chat=True)
    assert texts == ["".join(made.stream("hi", seed=3, defaults="model", chat=True))]


def test_what_is_not_followed_is_said(runner: Any) -> None:
    made = runner(num_beams=2)
    with pytest.warns(UserWarning, match="not followed: num_beams=2"):
        made.generate_ids([[1]], defaults="model", max_new_tokens=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.generate_ids([[1]], max_new_tokens=1)


def test_odd_arguments_are_refused(runner: Any) -> None:
    made = runner()
    with pytest.raises(OptionError, match="defaults is 'mine'"):
        made.generate_ids([[1]], defaults="mine")
    with pytest.raises(OptionError, match=r"max_new_tokens is 2\.5"):
        made.generate_ids([[1]], max_new_tokens=2.5)
    with pytest.raises(DataError, match="half of a surrogate pair"):
        made.generate("a\udcffb")
    with pytest.raises(DataError, match="half of a surrogate pair"):
        made.generate("a\ud800", chat=True)


def test_a_penalty_counts_each_rows_own_tokens(runner: Any) -> None:
    made = runner()
    rows = [[5, 6, 7, 8], [9, 10]]
    together = made.generate_ids(rows, max_new_tokens=12, repetition_penalty=1.8)
    alone = [made.generate_ids([row], max_new_tokens=12, repetition_penalty=1.8)[0] for row in rows]
    assert together == alone
    assert together != made.generate_ids(rows, max_new_tokens=12)
