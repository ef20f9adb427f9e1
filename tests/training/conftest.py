"""A tiny base with the shipped byte tokenizer, and data that trains in a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.saving import copy_tokenizer, make_llama, save_model


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "base"
    return make_llama(directory, max_position_embeddings=64, initializer_range=0.25)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its layers are Conv1D."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=264, n_positions=64)
    directory = save_model(GPT2LMHeadModel(config), tmp_path_factory.mktemp("models") / "gpt2")
    copy_tokenizer(directory)
    return directory


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [
        {"prompt": f"say {word}:", "completion": f" {word}!"} for word in ("one", "three", "eleven")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
