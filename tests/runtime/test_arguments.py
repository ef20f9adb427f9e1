"""Odd arguments of a Runner: each is refused by a LoraEdgeError, none hangs."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_edge.bundle.bundle import load_bundle
from lora_edge.errors import LoraEdgeError, OptionError
from lora_edge.runtime import Runner

NAN, INF, HUGE = math.nan, math.inf, 10**400


class _Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


# argument -> values that it cannot have
OPENING: dict[str, list[Any]] = {
    "bundle": [None, 5, b"bundle", "", "a\0b", ["bundle"], {}, object()],
    "provider": [None, 5, True, ["cpu"], b"cpu", "", "abacus", _Unspeakable()],
    "threads": [0, -1, 2.0, 1.5, "2", True, NAN, 10**6, 10**30, [2], np.float32(2), HUGE],
    "optimization": ["", "best", 1, True, ["all"], b"all"],
    "allow_fallback": [None, 1, 0, "yes", [], np.int64(1)],
    "provider_options": [5, "a=b", ["a"], {1: "b"}, {"a": None}, {"a": True}, {"a": "b"}],
    "pinned": [None, 5, "alpha", [5], [["alpha"]], ["no such"], {"alpha": 1.0}.items()],
    "verify": [None, True, "none", "FULL", 1],
    "cache_bytes": [None, -1, 1.5, 2.0, "1", True, NAN, [1]],
    "prefix_bytes": [None, -1, 1.5, 2.0, "1", True, NAN, [1]],
    "keep": [None, 5, b"alpha", [5], [["alpha"]], "no such", ["no such"], {"alpha": 1.0}],
}
ROWS: list[Any] = [
    *(None, 5, 1.5, True, "text", b"text", {}, {1: 2}, [], [[]], [[], [1]], [None], [5], ["text"]),
    *([[1.5]], [[True]], [["1"]], [[None]], [[1], [[2], [3, 4]]], [[-1]], [[264]], [[10**30]]),
    *(np.zeros((0, 3), np.int64), np.zeros((1, 3)), np.zeros((1, 2, 3), np.int64), np.int64(3)),
    *(iter([[1]]), [{1, 2}], [NAN], [[1, NAN]], object(), [[1] * 97], [[object()]], {1: [2]}),
]
MASKS: list[Any] = [
    *(5, True, "11", [1, 1], [[1]], [[1, 2]], [[1, 0], [1]], [[NAN, 1]], [[1, -1]], [["1", "1"]]),
    *([[None, 1]], {}, object(), [[0, 0]], np.ones((2, 2)), [[[1], [1]]], iter([[1, 1]])),
]
ADAPTERS: list[Any] = [
    *(5, True, 1.5, b"alpha", "", "no such", {"alpha"}, [], ["alpha", None], [5], [["alpha"]]),
    *({"alpha": None}, {"alpha": "1"}, {"alpha": True}, {"alpha": NAN}, {"alpha": INF}),
    *({"alpha": HUGE}, {"alpha": 1j}, {"alpha": np.complex64(1)}, {5: 1.0}, {None: 1.0}),
    *({"alpha": [1]}, {"alpha": 1e39}, object(), {"alpha": Fraction(1, 2)}),
]
GENERATING: dict[str, list[Any]] = {
    "max_new_tokens": [0, -1, 2.5, 2.0, "2", True, NAN, INF, 10**9, HUGE, [2], np.float64(2)],
    "temperature": [-1, -0.1, NAN, INF, "1", True, [1], 1j, HUGE, b"1"],
    "top_k": [-1, 1.5, "1", True, NAN, [1]],
    "top_p": [-1, 0, 1.1, NAN, "1", True, [1]],
    "min_p": [-1, 1.1, NAN, "1", True, [1]],
    "repetition_penalty": [0, -1, NAN, INF, "1", True, [1]],
    "seed": [-1, 1.5, "1", True, NAN, [1]],
    "defaults": [True, 1, "", "base", ["model"]],
    "start": [5, "a", [1], [[1]], [1.5], True],
}
TALKING: dict[str, list[Any]] = {
    "stop": [None, 5, True, [5], [None], b"a", [b"a"], "", [""], {"a": 1}, iter(["a"]), 1.5],
    "chat": [None, 1, 0, "yes", [], "chatml"],
    "tools": [5, "a", ["a"], [5], {"a": 1}, True],
    "documents": [5, "a", ["a"], [5], {"a": 1}, True],
}
PROMPTS: list[Any] = [None, 5, True, 1.5, b"a", [], [None], [5], [b"a"], {"a": 1}, {"a"}, [["a"]]]


def _cases() -> Iterator[Any]:
    for name, values in OPENING.items():
        yield from ((f"Runner({name})", "open", {name: value}) for value in values)
    for rows in ROWS:
        yield ("logits(input_ids)", "logits", {"input_ids": rows})
        yield ("generate_ids(rows)", "generate_ids", {"rows": rows})
    for mask in MASKS:
        yield ("logits(mask)", "logits", {"input_ids": [[1, 2]], "attention_mask": mask})
    for types in ([[0, 0]], 5, "a", [[0], [0]]):
        yield ("logits(types)", "logits", {"input_ids": [[1, 2]], "token_type_ids": types})
    for adapter in ADAPTERS:
        yield ("logits(adapter)", "logits", {"input_ids": [[1, 2]], "adapter": adapter})
        yield ("generate(adapter)", "generate", {"prompts": ["ab"], "adapter": adapter})
    for name, values in GENERATING.items():
        for value in values:
            yield (f"generate_ids({name})", "generate_ids", {"rows": [[1]], name: value})
            yield (f"generate({name})", "generate", {"prompts": "ab", name: value})
            if name != "start":
                yield (f"stream({name})", "stream", {"prompt": "ab", name: value})
    for name, values in TALKING.items():
        for value in values:
            yield (f"generate({name})", "generate", {"prompts": "ab", name: value})
            yield (f"stream({name})", "stream", {"prompt": "ab", name: value})
    for prompts in PROMPTS:
        yield ("generate(prompts)", "generate", {"prompts": prompts})
        yield ("generate(chat)", "generate", {"prompts": prompts, "chat": True})
        yield ("classify(inputs)", "classify", {"inputs": prompts})
        yield ("embed(texts)", "embed", {"texts": prompts})
        yield ("seq2seq(inputs)", "seq2seq_logits", {"inputs": prompts, "decoder_input_ids": 5})
    for tensors in (5, "a", {"a": 1}, {5: np.zeros(2)}, [1], {"a": None}, {"a": 1, 5: 2}):
        yield ("override(tensors)", "override", {"name": "alpha", "tensors": tensors})
    for name in (None, 5, "no such", ["alpha"], b"alpha"):
        yield ("override(name)", "override", {"name": name, "tensors": {}})


CASES = list(_cases())


@pytest.fixture(scope="module")
def runner(bundles: dict[str, Any]) -> Runner:
    return Runner(bundles["fused"], threads=1)


def test_there_are_many() -> None:
    assert len(CASES) >= 300


@pytest.mark.parametrize(("what", "method", "given"), CASES, ids=[case[0] for case in CASES])
def test_odd_arguments_are_refused(
    runner: Runner,
    bundles: dict[str, Any],
    what: str,
    method: str,
    given: dict[str, Any],
) -> None:
    def late(*_: Any) -> None:
        raise AssertionError(f"{what} hangs")

    def call() -> None:
        if method == "open":
            Runner(**{"bundle": bundles["fused"].directory, **given})
        elif method == "stream":
            list(runner.stream(**given))
        else:
            getattr(runner, method)(**given)

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    try:
        with pytest.raises(LoraEdgeError) as error:
            call()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert str(error.value)
    assert error.value.hint
    assert len(str(error.value)) < 500


def test_numbers_of_numpy_are_numbers(bundles: dict[str, Any]) -> None:
    runner = Runner(bundles["fused"], threads=np.int64(1))  # type: ignore[arg-type]
    found = runner.generate_ids(
        np.array([[1, 2]], np.int32),  # type: ignore[arg-type]
        {"alpha": np.float32(1)},
        np.int64(2),  # type: ignore[arg-type]
        temperature=np.float32(0),
    )
    assert found == runner.generate_ids([[1, 2]], "alpha", 2)
    assert runner.generate("ab", stop=["x", "y"], chat=False, max_new_tokens=1)


def test_token_types_of_a_decoder_are_not_passed_over(runner: Runner) -> None:
    with pytest.raises(OptionError, match="token_type_ids is for encoders"):
        runner.logits([[1, 2]], token_type_ids=[[0, 1]])


@pytest.mark.parametrize("odd", [None, 5, b"x", "", "a\0b", ["x"], {}, object(), True])
def test_load_bundle_takes_a_path(odd: Any) -> None:
    with pytest.raises(OptionError, match=r"^bundle is .*, expected a path"):
        load_bundle(odd)


def test_a_folder_that_is_none_is_said() -> None:
    with pytest.raises(LoraEdgeError, match="nowhere is not a bundle: it does not exist"):
        load_bundle(Path("/nowhere"))
