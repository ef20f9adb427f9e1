"""Models of the shapes that people use, with random weights, and adapters for them.

The cost of a step does not depend on the values of the weights. They are written tensor by tensor:
no model is ever whole in memory.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

_TOKENIZER = Path(__file__).parents[2] / "models" / "tiny-llama"
_SHARD = 1 << 30  # bytes
_SPREAD = 0.02
_NORM = 1.0


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; the defaults are SmolLM2-135M's.

    Attributes:
        kind: ``model_type`` of its config.
        dtype: of the checkpoint.
        rank: of its adapters.
    """

    kind: str = "llama"
    layers: int = 30
    hidden: int = 576
    intermediate: int = 1536
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    vocabulary: int = 49152
    positions: int = 8192
    tied: bool = True
    dtype: str = "float32"
    rank: int = 16

    def numbers(self) -> int:
        """Of all weights, but for norms and biases."""
        heads = self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = self.hidden * (heads + 3 * self.intermediate)
        return self.layers * layer + self.vocabulary * self.hidden * (1 if self.tied else 2)

    def config(self) -> Any:
        """transformers' config."""
        sizes = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.positions,
            "tie_word_embeddings": self.tied,
            "head_dim": self.head_dim,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
            "dtype": self.dtype,
        }
        return AutoConfig.for_model(self.kind, **sizes)


SHAPES = {
    "tiny": Shape(
        layers=2, hidden=64, intermediate=96, heads=2, kv_heads=1, head_dim=32, vocabulary=320,
        positions=1024, rank=4,
    ),
    "135M": Shape(),  # SmolLM2
    "0.5B": Shape(  # Qwen2.5; its q, k and v have biases
        kind="qwen2", layers=24, hidden=896, intermediate=4864, heads=14, kv_heads=2,
        vocabulary=151936,
    ),
    "1B": Shape(  # Llama 3.2
        layers=16, hidden=2048, intermediate=8192, heads=32, kv_heads=8, vocabulary=128256
    ),
    "3B": Shape(  # Llama 3.2
        layers=28, hidden=3072, intermediate=8192, heads=24, kv_heads=8, head_dim=128,
        vocabulary=128256, dtype="bfloat16",
    ),
    "8B": Shape(  # Llama 3.1
        layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128,
        vocabulary=128256, tied=False, dtype="bfloat16",
    ),
}  # fmt: skip


def _meta(shape: Shape) -> Any:
    """The model without its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape.config())


def make_model(folder: Path, shape: Shape) -> None:
    """A random checkpoint of a shape, in shards, with the tokenizer of bytes that ships."""
    folder.mkdir(parents=True)
    model = _meta(shape)
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, shape.dtype)
    shards: list[list[str]] = [[]]
    size = 0
    tensors = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if shape.tied and name.startswith("lm_head"):
            continue
        if size > _SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.numel() * dtype.itemsize
    index = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else file
        made = {}
        for name in names:
            whole = torch.empty(tensors[name].shape, dtype=dtype)
            norm = name.endswith("norm.weight")
            whole.fill_(_NORM) if norm else whole.normal_(std=_SPREAD, generator=generator)
            made[name] = whole
            index[name] = file
        save_file(made, folder / file, {"format": "pt"})
    if len(shards) > 1:
        total = {"total_size": sum(t.numel() for t in tensors.values()) * dtype.itemsize}
        text = json.dumps({"metadata": total, "weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    config = shape.config()
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    copy_tokenizer(folder)


def make_adapter(folder: Path, base: Path, shape: Shape, seed: int) -> None:
    """A random PEFT adapter on all linear layers but the head."""
    linear = {
        name: module
        for name, module in _meta(shape).named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, module in linear.items():
        sizes = {"A": (shape.rank, module.in_features), "B": (module.out_features, shape.rank)}
        for part, size in sizes.items():
            values = generator.standard_normal(size, np.float32) * np.float32(_SPREAD)
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = values
    folder.mkdir(parents=True)
    save_numpy(tensors, folder / "adapter_model.safetensors")
    LoraConfig(
        r=shape.rank,
        lora_alpha=shape.rank,
        target_modules=sorted({name.rpartition(".")[2] for name in linear}),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
        inference_mode=True,
    ).save_pretrained(folder)


def copy_tokenizer(folder: Path) -> None:
    """The tokenizer that ships, of bytes."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(_TOKENIZER / name, folder / name)


def facts(shape: Shape) -> dict[str, Any]:
    """As JSON."""
    return asdict(shape)
