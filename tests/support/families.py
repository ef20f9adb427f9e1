"""Two-layer random models of each architecture family, small enough to be made in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.support.saving import perturb, save_model

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
_GRANITE_MOE = {
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.5,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
}
_DEEPSEEK_ROUTER = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "topk_group": 1,
}
_LATENT = {
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
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
    "mixtral": _WINDOW | {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 56,
        "decoder_sparse_step": 1,
    },
    "qwen3_moe": {
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
    },
    "olmoe": {"num_experts": 5, "num_experts_per_tok": 2},
    "flex_olmo": {"num_experts": 5, "num_experts_per_tok": 2},
    "granitemoe": _GRANITE_MOE,
    "granitemoeshared": _GRANITE_MOE | {"shared_intermediate_size": 40},
    "phimoe": {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None},
    "minimax_m2": {"num_local_experts": 6, "num_experts_per_tok": 2},
    # Experts in groups, one dense layer, a shared expert; one group, as in the published models.
    "glm4_moe": _DEEPSEEK_ROUTER | {"n_group": 2},
    "dots1": _DEEPSEEK_ROUTER | {"n_group": 2, "sliding_window": None},
    "solar_open": _DEEPSEEK_ROUTER | {"n_group": 1},
    "ernie4_5_moe": {
        "moe_num_experts": 5,
        "moe_k": 2,
        "moe_intermediate_size": 40,
        "moe_num_shared_experts": 1,
    },
    "hunyuan_v1_moe": {"num_experts": 5, "moe_topk": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": _DEEPSEEK_ROUTER | _LATENT | {"n_group": 1},
    "deepseek_v3": _DEEPSEEK_ROUTER | _LATENT | {"n_group": 2},
    "gemma4_text": {
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 40,
        "enable_moe_block": True,
        "sliding_window": 8,
    },
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
_HEAD_DIM = ("head_dim",)
_WITHOUT = {
    "phi3": ("head_dim",),
    "gpt2": ("head_dim", "num_key_value_heads"),
    "opt": ("head_dim", "num_key_value_heads"),
    "gpt_neox": ("head_dim", "num_key_value_heads"),
    **dict.fromkeys(("qwen2_moe", "olmoe", "granitemoe", "granitemoeshared", "phimoe"), _HEAD_DIM),
}
SUPPORTED = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "smollm3",
    "olmo2", "granite", "gpt_neox", "opt",
)  # fmt: skip
# Mixtures of experts, with transformers 5 only.
MOE = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "granitemoe", "granitemoeshared",
    "phimoe", "minimax_m2", "glm4_moe", "dots1", "solar_open", "ernie4_5_moe", "hunyuan_v1_moe",
)  # fmt: skip
# Rotaries that repeat their angles, and norms behind the rotary.
OTHER_ROTARIES = ("ernie4_5", "glm", "glm4", "helium", "hunyuan_v1_dense")

# family -> (changes to its config, what the refusal names)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
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
    perturb(model.parameters())
    saved = model.state_dict()
    perturb(  # a router's correction of scores
        buffer
        for name, buffer in model.named_buffers()
        if name in saved and buffer.is_floating_point()
    )
    return save_model(model, directory)
