"""One row for each kind of adapter that PEFT makes and both modes take, on the bases that have it.

A row names what PEFT is asked for, and the *feature*: the graph inputs that carry what the kind
adds to plain LoRA. A test leaves exactly those out, so that a dropped feature cannot pass.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lora_edge.names import parse_lora_input
from tests.support.families import make_base
from tests.support.saving import load_model


@dataclasses.dataclass(frozen=True)
class Made:
    """A base, adapters of kinds that it has, and a bundle of them."""

    base: Path
    adapters: dict[str, Path]
    bundle: Path


class Row(NamedTuple):
    """A kind of adapter on a base.

    Attributes:
        base: key of :data:`BASES`.
        settings: fields of ``LoraConfig``, beside r = 3 and alpha = 4.
        feature: parts of the graph inputs that carry what is tested; empty: all of B.
        path: only inputs of module paths that end so.
        merged: whether merged mode takes it.
    """

    base: str
    settings: dict[str, Any]
    feature: tuple[str, ...] = ("B",)
    path: str = ""
    merged: bool = True


BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "gpt2": ("gpt2", {}),
    "gemma3": ("gemma3_text", {}),
}
_QV = ["q_proj", "v_proj"]

ROWS: dict[str, Row] = {
    "plain": Row("llama", {"target_modules": _QV}),
    "rslora": Row("llama", {"target_modules": _QV, "use_rslora": True, "lora_alpha": 2}),
    "patterns": Row(
        "llama",
        {
            "target_modules": ["q_proj", "o_proj", "down_proj"],
            "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2, "down_proj": 5},
            "alpha_pattern": {r".*1.*_proj": 7},
        },
    ),
    "layers": Row("llama", {"target_modules": _QV, "layers_to_transform": [1]}),
    "excluded": Row("llama", {"target_modules": _QV, "exclude_modules": r".*0.*q_proj"}),
    "regex": Row("llama", {"target_modules": r".*\.1\..*(up|gate)_proj"}),
    "all-linear": Row("llama", {"target_modules": "all-linear"}),
    "dora": Row("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}, ("G",)),
    "dora-rslora": Row(
        "llama", {"target_modules": "all-linear", "use_dora": True, "use_rslora": True}, ("G",)
    ),
    "lora-bias": Row("llama", {"target_modules": _QV, "lora_bias": True}, ("bias",)),
    "saved-head": Row(
        "llama", {"target_modules": _QV, "modules_to_save": ["lm_head"]}, path="lm_head"
    ),
    "saved-embedding": Row(
        "llama", {"target_modules": _QV, "modules_to_save": ["embed_tokens"]}, path="embed_tokens"
    ),
    "saved-norms": Row(
        "llama",
        {"target_modules": _QV, "modules_to_save": ["norm", "input_layernorm"]},
        ("weight",),
    ),
    "saved-linear": Row(
        "llama", {"target_modules": _QV, "modules_to_save": ["o_proj"]}, path="o_proj"
    ),
    "embedding": Row("llama", {"target_modules": ["q_proj", "embed_tokens"]}, path="embed_tokens"),
    "embedding-dora": Row("llama", {"target_modules": ["embed_tokens"], "use_dora": True}, ("G",)),
    "head": Row("llama", {"target_modules": ["q_proj", "lm_head"]}, path="lm_head"),
    "embedding-and-head": Row("llama", {"target_modules": ["lm_head", "embed_tokens"]}),
    "tokens": Row(
        "llama", {"target_modules": _QV, "trainable_token_indices": [3, 5]}, path="embed_tokens"
    ),
    "tokens-tied-head": Row(
        "llama", {"target_modules": _QV, "trainable_token_indices": [9]}, path="lm_head"
    ),
    "tokens-kept-tied": Row(
        "llama",
        {
            "target_modules": _QV,
            "trainable_token_indices": {"embed_tokens": [4]},
            "ensure_weight_tying": True,
        },
        path="lm_head",
    ),
    "alora": Row(
        "llama",
        {"target_modules": [*_QV, "down_proj"], "alora_invocation_tokens": [7, 9, 11]},
        merged=False,
    ),
    "bias-all": Row("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}, ("bias",)),
    "bias-lora-only": Row(
        "qwen2", {"target_modules": ["k_proj", "o_proj"], "bias": "lora_only"}, ("bias",)
    ),
    "bias-and-dora": Row(
        "qwen2", {"target_modules": ["q_proj"], "bias": "lora_only", "use_dora": True}, ("G",)
    ),
    "lora-bias-on-bias": Row(
        "qwen2", {"target_modules": ["q_proj", "o_proj"], "lora_bias": True}, ("bias",)
    ),
    "tokens-untied": Row(
        "qwen2", {"target_modules": _QV, "trainable_token_indices": [3, 8]}, path="embed_tokens"
    ),
    "tokens-of-the-head": Row(
        "qwen2",
        {
            "target_modules": _QV,
            "trainable_token_indices": {"embed_tokens": [3], "lm_head": [2, 6]},
        },
        path="lm_head",
    ),
    "conv1d": Row("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d-dora": Row(
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
        ("G",),
    ),
    "conv1d-bias-all": Row(
        "gpt2", {"target_modules": ["c_fc"], "fan_in_fan_out": True, "bias": "all"}, ("bias",)
    ),
    "conv1d-saved": Row(
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["mlp.c_proj"]},
        path="mlp.c_proj",
    ),
    "layernorm": Row(
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["ln_f", "ln_1"]},
        ("weight", "bias"),
    ),
    "positions": Row(
        "gpt2", {"target_modules": ["wpe", "c_attn"], "fan_in_fan_out": True}, path="wpe"
    ),
    "scaled-embedding": Row(
        "gemma3", {"target_modules": ["q_proj", "embed_tokens"]}, path="embed_tokens"
    ),
    "scaled-tokens": Row(
        "gemma3", {"target_modules": _QV, "trainable_token_indices": [5, 6]}, path="embed_tokens"
    ),
    "offset-norm": Row(
        "gemma3", {"target_modules": _QV, "modules_to_save": ["norm", "q_norm"]}, ("weight",)
    ),
}


def make_kind_base(key: str, directory: Path) -> Path:
    """The base that rows name."""
    family, changes = BASES[key]
    return make_base(family, directory, **changes)


def make_kind(base: Path, row: Row, directory: Path, seed: int = 1) -> Path:
    """An adapter of a row, everything that it carries away from its neutral value."""
    torch.manual_seed(seed)
    model = load_model(AutoModelForCausalLM, base)
    settings = {"r": 3, "lora_alpha": 4, **row.settings}
    with warnings.catch_warnings():
        # PEFT's advice on its own merge, and on what it saves along.
        warnings.simplefilter("ignore")
        adapted = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
        )
    carried = ("modules_to_save", "magnitude", "trainable_tokens_delta", ".bias")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and any(mark in name for mark in carried):
                parameter.add_(torch.randn_like(parameter) * 0.2 * max(float(parameter.std()), 0.3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(directory)
    return directory


def make_kinds(key: str, root: Path, names: Iterable[str]) -> tuple[Path, dict[str, Path]]:
    """A base and adapters of rows on it, each in a folder below ``root``."""
    base = make_kind_base(key, root / "base")
    return base, {name: make_kind(base, ROWS[name], root / name) for name in names}


def carries_feature(row: Row, name: str) -> bool:
    """Whether a graph input carries what a row tests."""
    parsed = parse_lora_input(name)
    return parsed is not None and parsed.part in row.feature and parsed.path.endswith(row.path)
