"""Two-layer random models without a cache, of each architecture family."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers.utils import logging

from lora_edge.tasks.task import Task
from tests.support.saving import load_model, perturb, save_model

_TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "initializer_range": 0.2,
}
_IMAGE: dict[str, Any] = {
    "image_size": 24,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
_ROBERTA = {"pad_token_id": 1, "type_vocab_size": 1}
_KV = {"num_key_value_heads": 2}
_OWN: dict[str, dict[str, Any]] = {
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "modernbert": {"local_attention": 8},
    "electra": {"embedding_size": 16},
    "llama": _KV,
    "mixtral": _KV,
    "qwen3": _KV | {"head_dim": 8},
    "mistral": _KV | {"head_dim": 8, "sliding_window": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 130},
    "dinov2": {"mlp_ratio": 2},
    "convnext": {"patch_size": 2, "num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 2]},
    "swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 3},
}
TEXT_FAMILIES = (
    "bert", "roberta", "xlm-roberta", "camembert", "distilbert", "modernbert", "electra", "llama",
    "qwen3", "mistral", "gpt2",
)  # fmt: skip
IMAGE_FAMILIES = ("vit", "deit", "dinov2")
TEXT_TASKS = ("text-classification", "token-classification", "feature-extraction")


def make_encoder(family: str, task: str, directory: Path, **changes: Any) -> Path:
    """Save a random model whose every parameter is perturbed, so that none is one or zero."""
    common = _IMAGE if family in (*IMAGE_FAMILIES, "convnext", "swin") else _TEXT
    fields = {**common, "num_labels": 3, **_OWN.get(family, {}), **changes}
    if family == "swin":  # its number of heads differs from stage to stage
        del fields["num_attention_heads"], fields["num_hidden_layers"]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # Some model files of transformers 4 compile their functions when they are imported.
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        model = _random_model(family, task, fields)
    perturb(model.parameters())
    return save_model(model, directory)


def _random_model(family: str, task: str, fields: dict[str, Any]) -> Any:
    config = transformers.CONFIG_MAPPING[family](**fields)
    if family == "deit" and task == "image-classification":
        # transformers' auto class asks for the head with a teacher's beside it
        return transformers.DeiTForImageClassification(config)
    return getattr(transformers, Task(task).loader).from_config(config)


def load_encoder(base: Path, task: str, labels: int = 0) -> Any:
    """The model of a task; with another number of labels, under a fresh head."""
    sized = {"num_labels": labels, "ignore_mismatched_sizes": True} if labels else {}
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return load_model(getattr(transformers, Task(task).loader), base, **sized).eval()
    finally:
        logging.set_verbosity(level)


def make_encoder_adapter(
    base: Path, task: str, directory: Path, labels: int = 0, seed: int = 1, **settings: Any
) -> Path:
    """Save an adapter whose every trained number differs from the base's."""
    torch.manual_seed(seed)
    model = load_encoder(base, task, labels)
    fields = {"r": 3, "lora_alpha": 4, "init_lora_weights": False, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, on what it saves along
        adapted = get_peft_model(model, LoraConfig(**fields))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad and "lora_" not in name:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        adapted.save_pretrained(directory)
    return directory
