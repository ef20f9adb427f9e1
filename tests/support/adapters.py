"""Random adapters with non-zero B, made by PEFT itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.support.saving import load_model


def make_adapter(base: Path, directory: Path, seed: int = 0, **settings: Any) -> Path:
    """Save an adapter whose effect is visible and not chaotic."""
    torch.manual_seed(seed)
    model = load_model(AutoModelForCausalLM, base)
    config = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(directory)
    return directory


def make_three(base: Path, folder: Path) -> dict[str, Path]:
    """``plain``: LoRA on attention; ``rooted``: rsLoRA on every layer; ``varied``: patterns."""
    some = ["q_proj", "k_proj", "v_proj", "o_proj"]
    settings: dict[str, dict[str, Any]] = {
        "plain": {"r": 4, "lora_alpha": 4, "target_modules": some},
        "rooted": {"r": 5, "lora_alpha": 4, "use_rslora": True, "target_modules": "all-linear"},
        "varied": {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["v_proj", "o_proj", "down_proj"],
            "rank_pattern": {"o_proj": 2, "down_proj": 7},
            "alpha_pattern": {"down_proj": 3},
        },
    }
    return {
        name: make_adapter(base, folder / name, seed, **own)
        for seed, (name, own) in enumerate(settings.items(), 1)
    }


def make_all_linear(family: str, base: Path, directory: Path) -> Path:
    """Save an adapter of every linear layer of a base of that family."""
    conv1d = family == "gpt2"
    settings = {"target_modules": "all-linear", "fan_in_fan_out": conv1d}
    return make_adapter(base, directory, r=3, lora_alpha=4, **settings)
