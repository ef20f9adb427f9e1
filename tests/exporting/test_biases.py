"""``bias="all"`` on models whose biases PEFT saves under names of its wrappers too."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import lora_edge
from lora_edge.adapter.load import load_adapter

_TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "num_labels": 3,
}
_IMAGE: dict[str, Any] = _TEXT | {"image_size": 32, "patch_size": 8}


def _roberta() -> Any:
    config = transformers.RobertaConfig(**_TEXT, pad_token_id=1)
    return transformers.RobertaForSequenceClassification(config)


def _vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**_IMAGE))


@pytest.mark.parametrize(
    ("make", "settings", "task", "bias"),
    [
        # The head is a module of two layers, whose biases have the adapter's name in their keys.
        (
            _roberta,
            {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
            None,
            "classifier.dense.bias",
        ),
        (
            _vit,
            {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]},
            "image-classification",
            "vit.embeddings.patch_embeddings.projection.bias",
        ),
    ],
)
def test_all_biases_are_exported_as_peft_loads_them(
    make: Any, settings: dict[str, Any], task: str | None, bias: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=3, bias="all", init_lora_weights=False, **settings)
        adapted = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad and name.endswith(".bias"):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(tmp_path / "a")
    assert bias in load_adapter(tmp_path / "a").saved
    bundle = lora_edge.export(
        tmp_path / "base", {"x": tmp_path / "a"}, output=tmp_path / "out", task=task
    )
    assert bundle.manifest.adapters["x"].proved
