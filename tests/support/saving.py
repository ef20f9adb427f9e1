"""Random models loaded and saved without progress bars, and the tokenizer that ships."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM
from transformers.utils import logging

from tests.support.paths import MODELS


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers shows none inside."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_model(loader: Any, base: Path, **options: Any) -> Any:
    """``loader.from_pretrained``."""
    with no_progress_bar():
        return loader.from_pretrained(base, **options)


def save_model(model: Any, directory: Path) -> Path:
    """``model.save_pretrained``; returns the directory."""
    with no_progress_bar():
        model.save_pretrained(directory)
    return directory


@torch.no_grad()
def perturb(parameters: Iterator[torch.Tensor]) -> None:
    """So that none is one or zero."""
    for parameter in parameters:
        parameter.add_(torch.randn_like(parameter) * 0.05)


def make_random(kind: Any, directory: Path, **fields: Any) -> Path:
    """Save a random model of a class; of two layers with four heads unless told otherwise."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, **fields}
    return save_model(kind(kind.config_class(**sizes)), directory)


def make_llama(directory: Path, **fields: Any) -> Path:
    """Save a tiny random Llama with the shipped tokenizer."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "vocab_size": 264,
        "tie_word_embeddings": True,
    }
    make_random(LlamaForCausalLM, directory, **sizes, **fields)
    copy_tokenizer(directory)
    return directory


def copy_tokenizer(directory: Path) -> None:
    """The shipped byte tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODELS / "tiny-llama" / name, directory)
