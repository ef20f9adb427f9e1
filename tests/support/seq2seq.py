"""Two-layer random encoder-decoders, and adapters for them made by PEFT itself."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.support.saving import perturb, save_model

VOCAB = 131
SUPPRESSED, SUPPRESSED_FIRST = [5, 9], [7, 2]
"""Of Whisper: tokens that it never says, or not first."""

_T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 56,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_BART: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 56,
    "init_std": 0.2,
}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", _T5),
    "t5-gated": (
        "T5ForConditionalGeneration",
        _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": ("BartForConditionalGeneration", _BART | {"max_position_embeddings": 64}),
    "whisper": (
        "WhisperForConditionalGeneration",
        _BART
        | {
            "num_mel_bins": 16,
            "max_source_positions": 20,
            "max_target_positions": 48,
            "decoder_start_token_id": 3,
            "bos_token_id": 2,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
}
ATTENTION = {
    "t5": ["q", "v"],
    "t5-gated": ["q", "v"],
    "bart": ["q_proj", "v_proj"],
    "whisper": ["q_proj", "v_proj"],
}
ALL = {
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "t5-gated": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "whisper": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}


optimum = [
    pytest.mark.optimum,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.skipif(
        importlib.util.find_spec("optimum") is None,
        reason="needs lora-edge[optimum] (transformers 4.57)",
    ),
]
"""Marks of what exports an encoder-decoder."""


def make_seq2seq(family: str, directory: Path) -> Path:
    """Save a random model whose every parameter is perturbed, so that none is one or zero."""
    name, fields = _MODELS[family]
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**fields))
    if family == "whisper":
        model.generation_config.suppress_tokens = SUPPRESSED
        model.generation_config.begin_suppress_tokens = SUPPRESSED_FIRST
    perturb(model.parameters())
    return save_model(model, directory)


def give_words(base: Path) -> None:
    """Give a T5 a tokenizer, whose words are w2, w3, …"""
    words = {"<pad>": 0, "</s>": 1} | {f"w{number}": number for number in range(2, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>"])
    tokenizer.save(str(base / "tokenizer.json"))


def make_seq2seq_adapter(
    base: Path, directory: Path, family: str, seed: int = 0, **settings: Any
) -> Path:
    """Save an adapter with non-zero B."""
    torch.manual_seed(seed)
    model = getattr(transformers, _MODELS[family][0]).from_pretrained(base)
    # PEFT's own forward for this type does not run Whisper, whose adapters have often no type.
    kind = None if family == "whisper" and seed % 2 else "SEQ_2_SEQ_LM"
    config = LoraConfig(init_lora_weights=False, task_type=kind, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's doubts about tied heads and biases
        get_peft_model(model, config).save_pretrained(directory)
    return directory
