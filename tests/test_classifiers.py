"""The shipped classifiers: heads of unequal sizes on one base, and what they tell apart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_edge.base.checkpoint import resolve_base
from lora_edge.capture import capture
from lora_edge.parity.plan.states import BASE as OFF
from lora_edge.parity.plan.states import only
from lora_edge.parity.reference import Reference
from lora_edge.runtime.text.tokenizer import Tokenizer
from lora_edge.tasks.task import Task
from tests.support.checks import checked
from tests.support.paths import MODELS
from tests.support.recipes import lines_of_recipe

BASE = MODELS / "tiny-bert"
LABELS = {"claims": ["false", "true"], "letters": ["copy", "other", "reverse", "upper"]}


def _record(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(
        (MODELS / "classifiers" / name / "training.json").read_text()
    )
    return record


def _lines(name: str) -> list[dict[str, str]]:
    data = MODELS / "data" / "classes" / f"{name}.jsonl"
    return [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]


def test_the_base_is_small_and_well_conditioned() -> None:
    base = resolve_base(BASE)
    task = Task("feature-extraction")
    reference = Reference(base, task)
    assert reference.parameters <= 1_000_000
    tokenizer = Tokenizer(BASE)
    rows = [
        {"input_ids": np.array(coded.ids), "token_type_ids": np.array(coded.type_ids)}
        for coded in (tokenizer.encode_input(line["text"]) for line in _lines("claims")[:20])
    ]
    narrow = reference.outputs(rows, [OFF] * len(rows))
    with reference.wide():
        wide = reference.outputs(rows, [OFF] * len(rows))
    assert max(np.abs(a - b).max() for a, b in zip(narrow, wide, strict=True)) <= 1e-5


def test_the_runtimes_tokenizer_equals_transformers() -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(BASE), Tokenizer(BASE)
    for first, second in (("Mia has a red ball.", None), ("upper(abc)=ABC é", "Who has it?")):
        wanted = theirs(first, second)
        coded = ours.encode_input(first, second)
        assert coded.ids == wanted["input_ids"]
        assert coded.type_ids == wanted["token_type_ids"]
        cut = theirs(first, second, truncation=True, max_length=7)
        assert ours.encode_input(first, second, max_length=7).ids == cut["input_ids"]
    assert ours.encode_input("Mia has").offsets == [(0, 0), (0, 3), (4, 7), (0, 0)]


@pytest.mark.parametrize("name", LABELS)
def test_the_adapter_brings_its_head_and_its_labels(name: str) -> None:
    record = _record(name)
    assert record["labels"] == LABELS[name]
    assert record["base"] == "models/tiny-bert"
    assert record["base_fingerprint"] == resolve_base(BASE).fingerprint()
    folder = MODELS / "classifiers" / name
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["task_type"], config["use_rslora"]) == ("SEQ_CLS", name == "letters")
    assert config["modules_to_save"] == ["classifier", "score"]
    tensors = load_file(folder / "adapter_model.safetensors")
    count = len(LABELS[name])
    assert tensors["base_model.model.classifier.weight"].shape == (count, 128)
    assert tensors["base_model.model.classifier.bias"].shape == (count,)
    factors = {key: tensor for key, tensor in tensors.items() if "lora_B" in key}
    assert "base_model.model.bert.pooler.dense.lora_B.weight" in factors
    assert all(np.abs(tensor).max() > 0 for tensor in factors.values())
    ranks = {tensor.shape[1] for tensor in factors.values()}
    assert ranks == ({8} if name == "claims" else {12, 4})


@pytest.mark.parametrize("name", LABELS)
def test_the_adapter_tells_apart_what_the_base_does_not(name: str) -> None:
    labels, lines, tokenizer = LABELS[name], _lines(name), Tokenizer(BASE)
    reference = Reference(resolve_base(BASE), Task("text-classification", len(labels)))
    reference.attach(name, MODELS / "classifiers" / name, len(labels))
    rows = [
        {"input_ids": np.array(coded.ids), "token_type_ids": np.array(coded.type_ids)}
        for coded in (tokenizer.encode_input(line["text"]) for line in lines)
    ]

    def share(outputs: Any) -> float:
        hits = [labels[o.argmax()] == line["label"] for o, line in zip(outputs, lines, strict=True)]
        return sum(hits) / len(hits)

    assert share(reference.outputs(rows, [only(name)] * len(rows))) >= 0.95
    assert abs(share(reference.outputs(rows, [OFF] * len(rows))) - 1 / len(labels)) <= 0.1


@pytest.mark.parametrize("name", LABELS)
def test_held_out_lines_are_those_of_the_recipe(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, held_out = lines_of_recipe("classes", name, tmp_path, monkeypatch)
    assert held_out == (MODELS / "data" / "classes" / f"{name}.jsonl").read_bytes()
    assert _record(name)["data"]["sha256"] == hashlib.sha256(trained).hexdigest()
    texts = {json.loads(line)["text"] for line in trained.splitlines()}
    assert not texts & {line["text"] for line in _lines(name)}


@pytest.mark.parametrize("task", [Task("text-classification", 4), Task("feature-extraction")])
def test_the_base_is_captured(task: Task, tmp_path: Path) -> None:
    base = resolve_base(BASE)
    graph = capture(base, tmp_path, task)
    figures = checked(graph, base, task)
    assert figures["limit"] <= 1e-4
    assert graph.reads.max_length == 128
