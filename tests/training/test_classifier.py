"""Training a classifier: the data, what carries gradient, what is written, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from lora_edge.base.checkpoint import resolve_base
from lora_edge.errors import BaseModelError, DataError, UnsupportedModelError
from lora_edge.tasks.task import Task, fresh_head
from lora_edge.training import train
from lora_edge.training.batches import collate
from lora_edge.training.data import read_data
from lora_edge.training.model import load_model, load_tokenizer
from lora_edge.training.tokens import classify
from tests.support.paths import ROOT
from tests.support.saving import copy_tokenizer, make_random

QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 2, "lr": 1e-2, "rank": 3, "alpha": 5.0}
ROWS = [("one and two", "small"), ("ninety nine", "big"), ("three", "small"), ("eleven", "middle")]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    rows = [{"text": text, "label": label} for text, label in ROWS]
    return write(tmp_path / "labelled.jsonl", rows)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT without a head, with the shipped byte tokenizer, which has no token types."""
    from transformers import BertModel

    directory = make_random(
        BertModel,
        tmp_path_factory.mktemp("models") / "encoder",
        hidden_size=24,
        intermediate_size=40,
        vocab_size=264,
        max_position_embeddings=32,
        initializer_range=0.25,
    )
    copy_tokenizer(directory)
    return directory


def test_labels_are_sorted_as_what_they_are(tmp_path: Path, labelled: Path) -> None:
    read = read_data(labelled)
    assert read.labels == ("big", "middle", "small")
    assert [(x.text, x.label) for x in read.rows] == ROWS
    numbers = [{"text": "a", "label": n} for n in (10, 9, 10)]
    assert read_data(write(tmp_path / "numbers.jsonl", numbers)).labels == ("9", "10")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], "holds one label only"),
        ([{"text": "a", "label": "1"}, {"text": "b", "label": 1}], "of two kinds"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": True}], "'label' is bool, expected"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": ""}], ":2: 'label' is empty"),
        ([{"text": "", "label": "x"}], ":1: 'text' is empty"),
        (
            [{"text": "a", "label": "x"}, {"prompt": "b", "completion": "y"}],
            ":2: expected the keys 'text' and 'label', got 'prompt', 'completion'",
        ),
        (
            [{"prompt": "b", "completion": "y"}, {"text": "a", "label": "x"}],
            ":2: expected the keys 'prompt' and 'completion', got 'text', 'label'",
        ),
        ([{"txt": "a"}], "'prompt' and 'completion' or 'text' and 'label' or 'text', got 'txt'"),
        (
            [{"text": "a", "label": "x"}, {"text": "b"}],
            ":2: expected the keys 'text' and 'label', got 'text'",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_data(write(tmp_path / "data.jsonl", rows))


def test_a_long_text_is_cut_and_keeps_its_special_tokens() -> None:
    tokenizer = load_tokenizer(resolve_base(ROOT / "models" / "tiny-bert"))
    rows = [{"text": "Mia has a red ball.", "label": "x"}]
    examples = [type("Row", (), row)() for row in rows]
    (whole,) = classify(examples, ["w", "x"], tokenizer, 64)
    (short,) = classify(examples, ["w", "x"], tokenizer, 5)
    assert (whole.label, whole.cut, short.cut) == (1, 0, len(whole.input_ids) - 5)
    assert short.input_ids == (*whole.input_ids[:4], whole.input_ids[-1])
    batch = collate([whole, short], 7, types=True)
    assert batch["labels"].tolist() == [1, 1]
    assert batch["input_ids"][1, 5:].unique().tolist() == [7]
    assert batch["attention_mask"].sum(1).tolist() == [len(whole.input_ids), 5]
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    assert "token_type_ids" not in collate([whole], 7)


@pytest.mark.parametrize("family", ["encoder", "base"])
def test_the_head_is_trained_and_saved_with_its_labels(
    family: str, labelled: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    notes: list[str] = []
    made, again = (
        train(folder, labelled, tmp_path / name, notify=notes.append, **QUICK)
        for name in ("made", "again")
    )
    for name in ("adapter_model.safetensors", "adapter_config.json", "training.json"):
        assert (made / name).read_bytes() == (again / name).read_bytes()
    config = json.loads((made / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["classifier", "score"]
    record = json.loads((made / "training.json").read_text())
    assert record["labels"] == ["big", "middle", "small"]
    assert record["data"]["examples"] == 4
    assert notes[0].startswith("4 examples, ")
    assert "one label each" in notes[0]
    tensors = load_file(made / "adapter_model.safetensors")
    head, hidden = ("classifier", 24) if family == "encoder" else ("score", 32)
    weight = tensors[f"base_model.model.{head}.weight"]
    assert weight.shape == (3, hidden)
    fresh = torch.from_numpy(fresh_head(f"{head}.weight", (3, hidden)))
    assert (weight - fresh).abs().max() > 1e-3
    assert all(value.abs().sum() > 0 for key, value in tensors.items() if "lora_B" in key)


def test_what_was_learnt_is_in_the_adapter(encoder: Path, labelled: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    made = train(encoder, labelled, tmp_path / "a", epochs=40, lr=2e-2, batch_size=4, rank=4)
    found = resolve_base(encoder)
    task = Task("text-classification", 3)
    tokenizer = load_tokenizer(found)
    read = read_data(labelled)
    batch = collate(classify(read.rows, read.labels, tokenizer, 32), tokenizer.pad_token_id)
    wanted = batch.pop("labels")
    with torch.inference_mode():
        trained = PeftModel.from_pretrained(load_model(found, task), made).eval()
        assert trained(**batch).logits.argmax(-1).tolist() == wanted.tolist()
        bare = load_model(found, task).eval()
        assert bare(**batch).logits.argmax(-1).tolist() != wanted.tolist()


def test_a_decoder_is_told_its_padding(base: Path, labelled: Path, tmp_path: Path) -> None:
    """Without it a Llama takes one row at a time only."""
    config = json.loads((base / "config.json").read_text())
    assert config.get("pad_token_id") is None
    train(base, labelled, tmp_path / "a", **QUICK)


def test_conv1d_is_known_beside_a_linear_head(labelled: Path, gpt2: Path, tmp_path: Path) -> None:
    made = train(gpt2, labelled, tmp_path / "a", **QUICK)
    assert json.loads((made / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_refused_bases(encoder: Path, labelled: Path, tmp_path: Path) -> None:
    from transformers import BertForMaskedLM, ViTConfig, ViTModel

    masked = tmp_path / "masked"
    BertForMaskedLM.from_pretrained(encoder).save_pretrained(masked)
    copy_tokenizer(masked)
    with pytest.raises(BaseModelError, match=r"lacks 2 of its weights.*pooler"):
        train(masked, labelled, tmp_path / "a", **QUICK)
    images = tmp_path / "vit"
    ViTModel(
        ViTConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(images)
    copy_tokenizer(images)
    with pytest.raises(UnsupportedModelError, match="is no model for text-classification"):
        train(images, labelled, tmp_path / "a", **QUICK)
    assert not (tmp_path / "a").exists()


def test_the_command_finds_the_task_in_the_data(
    encoder: Path, labelled: Path, tmp_path: Path
) -> None:
    from lora_edge.cli.train import command

    out = tmp_path / "a"
    arguments = [str(encoder), str(labelled), "-o", str(out), "--epochs", "1", "--rank", "2"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.stdout == f"{out}\n"
    assert json.loads((out / "training.json").read_text())["labels"] == ["big", "middle", "small"]
