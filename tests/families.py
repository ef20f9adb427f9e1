"""Two-layer random models of each architecture family, small enough to be made in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import logging

_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WINDOW = {"sliding_window": 8}
_OWN: dict[str, dict[str, Any]] = {
    # A head of 32: the rotary is computed inside the attention operator.
    "llama": {"head_dim": 32},
    "mistral": _WINDOW,
    # A softcap of 2 binds on random weights.
    "gemma2": _WINDOW | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    "gemma3_text": _WINDOW
    | {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {"no_rope_layers": [1, 0]},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
}
_WITHOUT = {
    "phi3": ("head_dim",),
    "gpt2": ("head_dim", "num_key_value_heads"),
    "opt": ("head_dim", "num_key_value_heads"),
    "gpt_neox": ("head_dim", "num_key_value_heads"),
}
SUPPORTED = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "smollm3",
    "olmo2", "granite", "gpt_neox", "opt",
)  # fmt: skip

# family -> (changes to its config, what the refusal names)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mixtral": ({"num_local_experts": 4}, "num_local_experts"),  # mixture of experts
    "bloom": ({}, "alibi"),
    # Its attention is its own, not transformers' common interface.
    "gptj": ({"n_layer": 2, "n_embd": 64, "n_head": 4, "rotary_dim": 16}, "attention"),
}


def make_base(family: str, directory: Path, **changes: Any) -> Path:
    """Save a random model whose every parameter is perturbed, so that none is one or zero."""
    fields = {**_COMMON, **_OWN.get(family, {}), **changes}
    for field in _WITHOUT.get(family, ()):
        fields.pop(field, None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    logging.disable_progress_bar()
    try:
        model.save_pretrained(directory)
    finally:
        logging.enable_progress_bar()
    return directory
