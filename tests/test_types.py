"""Odd arguments of the package's functions: each is an error of ours at once, before any work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_edge
from lora_edge.bundle.bundle import Bundle
from lora_edge.errors import LoraEdgeError
from lora_edge.types import MOST_THREADS, number, shown, whole
from tests.support.paths import MODELS

NAN = math.nan
BASE, ADAPTER = MODELS / "tiny-llama", MODELS / "adapters" / "echo"
PATHS: list[Any] = [None, 5, True, b"x", "", "a\0b", ["x"], {}, object(), 1.5]
FLAGS: list[Any] = [None, 0, 1, "yes", [], 2.0]
NAMED: list[Any] = [5, "a=b", ["a"], {5: "x"}, {"a": 5}, {"a": None}, {"a": ""}, {"a": [ADAPTER]}]
CALLED: list[Any] = [5, "print", [print]]
WORD: list[Any] = [None, 5, True, "", "sideways", ["fused"], b"fused"]

ODD: dict[str, dict[str, list[Any]]] = {
    "export": {
        "base": PATHS,
        "adapters": NAMED,
        "mode": WORD,
        "form": [word for word in WORD if word is not None],
        "targets": [5, [5], "netscape", ["cpu", "netscape"], True],
        "backend": WORD,
        "sites": WORD,
        "precision": WORD,
        "task": [5, True, "", "sideways", ["text-generation"]],
        "kinds": [None, 5, "lora", ["sideways"], [5], [["lora"]], True],
        "convert": [0, -1, 1.5, True, "8", NAN, math.inf, [8], 10**400],
        "output": PATHS,
        "force": FLAGS,
        "progress": CALLED,
    },
    "add": {"bundle": PATHS, "adapters": [None, *NAMED], "base": [5, True, "", ["x"], b"x"]},
    "validate": {
        "bundle": PATHS,
        "reference": [5, True, "", b"x", ["x"], {}],
        "adapters": NAMED,
        "provider": [None, 5, True, "abacus", [], [5], b"cpu"],
        "provider_options": [5, "a=b", {"a": "b"}, {5: "a"}],
        "allow_fallback": FLAGS,
        "optimization": [5, True, "best", [5], ["best"]],
        "depth": [None, 5, "deep", ["full"]],
        "steps": [0, -1, 1.5, True, "8", NAN, 2.0],
        "seed": [None, -1, 1.5, True, "8", NAN],
        "prompts": [None, 5, "one text", [5], [["a"]]],
        "examples": [None, 5, "a", ["a"], [5], [{}]],
        "metric": [5, True, ["accuracy"]],
        "resume": [5, True, "", ["x"]],
        "repro": [5, True, "", ["x"]],
        "progress": CALLED,
    },
    "train": {
        "base": PATHS,
        "data": PATHS,
        "output": PATHS,
        "evaluation": [5, True, "", ["x"]],
        "settings": [5, "a", {}, ["a"]],
        "resume": FLAGS,
        "force": FLAGS,
        "progress": CALLED,
        "notify": CALLED,
        "rank": [0, 1.5, "8", True, None, NAN],
        "alpha": [0, -1, "8", None, NAN, True],
        "lr": [0, "1", None, NAN, [1]],
        "dropout": [1, -1, "0", None, NAN],
        "epochs": ["3", None, NAN, 0],
        "rslora": FLAGS,
        "packing": FLAGS,
        "target_modules": [5, [5], "", [], True],
        "rank_pattern": [5, "a", ["a"], {"a": "b"}, {5: 5}, None],
        "alpha_pattern": [5, {"a": None}],
        "modules_to_save": [5, [5], True, None],
        "layers": [5, "1", ["1"], [1.5], None],
        "precision": WORD,
        "device": [None, 5, "tpu", True],
        "nonsense": [1],
        "seed": [-1, 1.5, "1", True, None],
    },
    "load_adapter": {"path": PATHS, "name": [5, True, b"x", ["x"]]},
    "load_bundle": {"directory": PATHS},
}


def _cases() -> Iterator[Any]:
    for function, arguments in ODD.items():
        for name, values in arguments.items():
            for value in values:
                yield pytest.param(function, {name: value}, id=f"{function}({name})")


CASES = list(_cases())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle without adapters: what is odd is refused before it would matter."""
    folder = tmp_path_factory.mktemp("options") / "bundle"
    return lora_edge.export(BASE, {}, output=folder, sites="adapters", form="portable")


def test_there_are_many() -> None:
    assert len(CASES) >= 200


@pytest.mark.parametrize(("function", "odd"), CASES)
def test_odd_arguments_are_refused(
    function: str, odd: dict[str, Any], bundle: Bundle, tmp_path: Path
) -> None:
    usual: dict[str, dict[str, Any]] = {
        "export": {"base": BASE, "adapters": {}, "output": tmp_path / "out"},
        "add": {"bundle": bundle.directory, "adapters": {"echo": ADAPTER}},
        "validate": {"bundle": bundle.directory},
        "train": {
            "base": BASE,
            "data": MODELS / "data" / "echo.jsonl",
            "output": tmp_path / "adapter",
        },
        "load_adapter": {"path": ADAPTER},
        "load_bundle": {},
    }
    call: Callable[..., Any] = getattr(lora_edge, function)
    with pytest.raises(LoraEdgeError) as error:
        call(**{**usual[function], **odd})
    assert str(error.value)
    assert error.value.hint
    assert list(tmp_path.iterdir()) == []


def test_what_is_shown_is_short() -> None:
    assert shown("x" * 1000) == "a str"
    assert shown(np.zeros((9, 9))) == "a ndarray"
    assert shown(3) == "3"


def test_numbers() -> None:
    assert whole("n", np.int32(3), 1) == 3
    assert number("x", np.float32(0.5)) == 0.5
    assert number("x", 2, 0, 3) == 2.0
    assert MOST_THREADS >= 256
