"""Long prompts have the shape of the bundle's chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_edge.parity.plan.conversation import chat_row
from lora_edge.runtime.text.tokenizer import Tokenizer
from tests.support import shipped


def _runner(directory: Path, vocab_size: int = 264) -> Any:
    part = SimpleNamespace(vocab_size=vocab_size)
    return SimpleNamespace(tokenizer=Tokenizer(directory), part=part)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(shipped.BASE / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("length", [60, 250, 400])
def test_a_conversation_of_about_that_length(folder: Path, length: int) -> None:
    runner = _runner(folder)
    row = chat_row(runner, length, 0)
    assert row is not None
    assert length - 20 <= len(row) <= length
    special = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in special}
    assert {ids["<|system|>"], ids["<|user|>"], ids["<|assistant|>"], ids["<|end|>"]} <= set(row)
    assert row[-1] == ids["<|assistant|>"]
    assert chat_row(runner, length, 1) != row == chat_row(runner, length, 0)


def test_a_template_without_a_system_prompt(folder: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    own = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template + own, encoding="utf-8")
    row = chat_row(_runner(folder), 100, 0)
    assert row is not None
    assert 80 <= len(row) <= 100


def test_none_where_there_is_none(folder: Path) -> None:
    assert chat_row(_runner(folder), 3, 0) is None  # no conversation is so short
    assert chat_row(_runner(folder, vocab_size=100), 100, 0) is None  # ids that the model lacks
    (folder / "chat_template.jinja").unlink()
    assert chat_row(_runner(folder), 100, 0) is None
