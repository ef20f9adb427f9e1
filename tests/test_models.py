"""What ships in models/: the bytes are those of CHECKSUMS, and the adapters are what they claim."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from lora_edge.adapter.load import load_adapter
from lora_edge.base.checkpoint import resolve_base
from tests.support.paths import MODELS
from tests.support.recipes import lines_of_recipe

ADAPTERS = ("mirror", "shout", "echo")
SHIPPED = ("tiny-llama", "tiny-bert", "adapters", "classifiers", "data")
LIMIT = 20_000_000


def shipped_files() -> list[Path]:
    return sorted(p for folder in SHIPPED for p in (MODELS / folder).rglob("*") if p.is_file())


def test_checksums_hold_and_leave_no_file_out() -> None:
    lines = (MODELS / "CHECKSUMS").read_text(encoding="utf-8").splitlines()
    claimed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    found = {
        path.relative_to(MODELS).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in shipped_files()
    }
    assert found == claimed


def test_the_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in shipped_files()) <= LIMIT


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_was_trained_on_the_shipped_base_and_does_something(name: str) -> None:
    adapter = load_adapter(MODELS / "adapters" / name)
    assert adapter.base_fingerprint == resolve_base(MODELS / "tiny-llama").fingerprint()
    assert adapter.base_model == "models/tiny-llama"
    assert all(np.abs(module.b).max() > 0 for module in adapter.modules.values())


def test_the_adapters_are_unlike_each_other() -> None:
    loaded = {name: load_adapter(MODELS / "adapters" / name) for name in ADAPTERS}
    shout, mirror, echo = (loaded[name].modules for name in ("shout", "mirror", "echo"))
    assert {path.rpartition(".")[2] for path in shout} == {"q_proj", "v_proj"}
    assert {(m.rank, m.scaling) for m in shout.values()} == {(8, 2.0)}
    assert len(mirror) == len(echo) == 7 * 3
    assert loaded["mirror"].kind == "rsLoRA"
    assert {(m.rank, m.scaling) for m in mirror.values()} == {(16, 16 / math.sqrt(16))}
    assert {(m.rank, m.alpha) for m in echo.values()} == {
        (4, 16.0),
        (8, 16.0),
        (8, 4.0),
        (12, 36.0),
        (24, 36.0),
    }


@pytest.mark.parametrize("name", [None, *ADAPTERS])
def test_exact_match_on_held_out_lines(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(MODELS / "recipes"))
    import evaluate

    model, tokenizer = evaluate.load(None if name is None else MODELS / "adapters" / name)
    for task in ADAPTERS if name is None else (name,):
        score = evaluate.exact_match(model, tokenizer, MODELS / "data" / f"{task}.jsonl")
        assert score <= 0.10 if name is None else score >= 0.95


@pytest.mark.parametrize("name", ADAPTERS)
def test_held_out_lines_are_those_of_the_recipe(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, held_out = lines_of_recipe("tasks", name, tmp_path, monkeypatch)
    assert held_out == (MODELS / "data" / f"{name}.jsonl").read_bytes()
    record = json.loads((MODELS / "adapters" / name / "training.json").read_text())
    assert record["data"]["sha256"] == hashlib.sha256(trained).hexdigest()
    prompts = {json.loads(line)["prompt"] for line in trained.splitlines()}
    assert not prompts & {json.loads(line)["prompt"] for line in held_out.splitlines()}
