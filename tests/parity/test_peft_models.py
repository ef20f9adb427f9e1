"""A large model computes in float64 layer by layer, as a small one does that is cast as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from lora_edge.parity import peft_models
from lora_edge.parity.peft_models import widened
from lora_edge.tasks.task import Task
from tests.support.encoders import make_encoder
from tests.support.families import make_base
from tests.support.seq2seq import make_seq2seq

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("text-generation", {"target_modules": "all-linear", "use_dora": True}),
    "gpt2": (
        "text-generation",
        {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True},
    ),
    "mixtral": ("text-generation", {"target_modules": ["q_proj"]}),
    "albert": ("text-classification", {"target_modules": ["query"]}),
    "bert": ("feature-extraction", {"target_modules": ["query"], "use_dora": True}),
    "vit": ("image-classification", {"target_modules": "all-linear"}),
    "t5": ("text2text-generation", {"target_modules": ["q", "wi"]}),
    "whisper": ("automatic-speech-recognition", {"target_modules": ["q_proj", "fc1"]}),
}


def _model(family: str, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    task, settings = CASES[family]
    row: dict[str, torch.Tensor] = {"input_ids": torch.tensor([[5, 9, 7, 8, 11]])}
    if Task(task).causal:
        base = make_base(family, folder)
    elif Task(task).seq2seq:
        base = make_seq2seq(family, folder)
        row["decoder_input_ids"] = torch.tensor([[3, 8, 4]])
    else:
        base = make_encoder(family, task, folder)
    own = transformers.AutoConfig.from_pretrained(base)
    if hasattr(own, "_experts_implementation"):
        own._experts_implementation = "eager"  # the grouped operator takes no float64
    loaded = getattr(transformers, Task(task).loader).from_pretrained(base, config=own)
    random = torch.Generator().manual_seed(0)
    if loaded.main_input_name == "pixel_values":
        size = loaded.config.image_size
        row = {"pixel_values": torch.randn(1, 3, size, size, generator=random)}
    elif loaded.main_input_name == "input_features":
        row = {**row, "input_features": torch.randn(1, 16, 40, generator=random)}
        del row["input_ids"]
    config = LoraConfig(r=4, init_lora_weights=False, **settings)
    return get_peft_model(loaded, config).eval(), row


@pytest.mark.parametrize("family", CASES)
def test_layer_by_layer_is_as_the_whole(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, row = _model(family, tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wide = {k: x.double() if x.is_floating_point() else x for k, x in row.items()}
    total = sum(x.numel() for x in model.parameters())
    most = 0

    def count(*_: Any) -> None:
        nonlocal most
        doubles = (x.numel() for x in model.parameters() if x.dtype == torch.float64)
        most = max(most, sum(doubles))

    def run() -> list[np.ndarray]:
        with torch.inference_mode():
            found = model.base_model(**wide)
        values = (found[0], *(x for x in found[1:] if isinstance(x, torch.Tensor)))
        return [x.numpy() for x in values]

    with widened(model):
        whole = run()
    monkeypatch.setattr(peft_models, "_CAST_WHOLE", 0)
    with widened(model):
        hooks = [x.register_forward_hook(count) for x in model.modules() if not list(x.children())]
        parts = run()
    for hook in hooks:
        hook.remove()
    assert whole[0].dtype == np.float64
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one, other)
    assert 0 < most <= total
    assert most < total or family == "albert"  # its layers are one
    assert all(x.dtype == torch.float32 for x in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
