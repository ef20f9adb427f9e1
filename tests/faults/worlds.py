"""The bundles that faults are made in: small random bases, unlike adapters, each exported once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy as st
import tokenizers
import transformers

import lora_edge
from tests.support.adapters import make_adapter, make_three
from tests.support.encoders import make_encoder
from tests.support.families import make_base
from tests.support.kinds import ROWS, make_kind
from tests.support.paths import ROOT
from tests.support.saving import no_progress_bar

GRID = 1 / 32
"""Step of the weights of the base that is merged into, as if it had been quantized."""

_POSITIONS = 32  # half of it is decoded


Maker = Callable[[Path], tuple[Path, dict[str, Path], dict[str, Any]]]
"""An empty folder -> a base, its adapters, and how they are exported."""


class World(NamedTuple):
    """A base and the bundle of it and its adapters."""

    base: Path
    bundle: Path


class Worlds:
    """Makes each world when it is first asked for, in folders below ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.world = cache(self._world)

    def _world(self, name: str) -> World:
        folder = self.root / name
        folder.mkdir()
        with no_progress_bar():
            base, adapters, options = _WORLDS[name](folder)
            lora_edge.export(base, adapters, output=folder / "bundle", **options)
        return World(base, folder / "bundle")

    def copy(self, name: str, directory: Path) -> World:
        """A copy of the bundle that may be broken."""
        base, bundle = self.world(name)
        return World(base, Path(shutil.copytree(bundle, directory)))


def _llama(folder: Path, **changes: Any) -> Path:
    """Square projections, and no two layers alike."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    rest = {"num_key_value_heads": 4, "max_position_embeddings": _POSITIONS}
    return make_base("llama", folder / "base", **{**sizes, **rest, **changes})


def _portable(folder: Path) -> tuple[Path, dict[str, Path], dict[str, Any]]:
    base = _llama(folder)
    words = {f"w{index}": index for index in range(97)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(base / "tokenizer.json"))
    other = _llama(folder / "other", initializer_range=0.05)
    some = ["q_proj", "k_proj", "v_proj", "o_proj"]
    make_adapter(other, folder / "foreign", 7, r=4, lora_alpha=4, target_modules=some)
    return base, make_three(base, folder), {"form": "portable"}


def _fused(folder: Path) -> tuple[Path, dict[str, Path], dict[str, Any]]:
    base = _llama(folder, num_key_value_heads=2)
    return base, make_three(base, folder), {}


def _far(folder: Path) -> tuple[Path, dict[str, Path], dict[str, Any]]:
    """Room for long prompts, and a head of 32, whose rotary is inside the attention operator."""
    base = _llama(
        folder, max_position_embeddings=256, head_dim=32, hidden_size=64, num_key_value_heads=2,
        num_attention_heads=2,
    )  # fmt: skip
    return base, make_three(base, folder), {}


def _experts(folder: Path) -> tuple[Path, dict[str, Path], dict[str, Any]]:
    base = make_base("mixtral", folder / "base", max_position_embeddings=_POSITIONS)
    some = ["q_proj", "v_proj"]
    return base, {"plain": make_adapter(base, folder / "plain", 1, target_modules=some)}, {}


def _of_kinds(base: Path, folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """No two with the same factors: each could pass for the other without its feature."""
    return {
        name: make_kind(base, ROWS[name], folder / name, seed) for seed, name in enumerate(names)
    }


def _kinds(folder: Path) -> tuple[Path, dict[str, Path], dict[str, Any]]:
    base = make_base(
        "llama", folder / "base", tie_word_embeddings=True, max_position_embeddings=_POSITIONS
    )
    names = ("plain", "dora", "lora-bias", "tokens", "alora", "saved-norms", "embedding")
    return base, _of_kinds(base, folder, names), {}


def _gpt2(folder: Path) -> tuple[Path, dict[str, Path], dict[str, Any]]:
    base = make_base("gpt2", folder / "base", n_positions=_POSITIONS)
    return base, _of_kinds(base, folder, ("conv1d", "conv1d-bias-all", "positions")), {}


def _heads(folder: Path) -> tuple[Path, dict[str, Path], dict[str, Any]]:
    """A classifier, and two adapters with heads of their own."""
    from peft import LoraConfig, get_peft_model
    from torch import randn_like

    base = make_encoder("bert", "text-classification", folder / "base")
    adapters = {}
    for seed, name in enumerate(("sorts", "ranks")):
        transformers.set_seed(seed)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
        config = LoraConfig(
            r=3 + seed, target_modules=["query", "value"], task_type="SEQ_CLS",
            init_lora_weights=False,
        )  # fmt: skip
        adapted = get_peft_model(model, config)
        for key, parameter in adapted.named_parameters():
            if "modules_to_save" in key:
                parameter.data.add_(randn_like(parameter) * 0.2)
        adapted.save_pretrained(folder / name)
        adapters[name] = folder / name
    return base, adapters, {}


_MODELS = ROOT / "models"


def _texts(folder: Path) -> tuple[Path, dict[str, Path], dict[str, Any]]:
    """A base with a tokenizer and a chat template."""
    base = _llama(folder, vocab_size=264, eos_token_id=258, bos_token_id=257)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(_MODELS / "tiny-llama" / name, base / name)
    targets = ["q_proj", "v_proj"]
    return base, {"plain": make_adapter(base, folder / "plain", 1, r=4, target_modules=targets)}, {}


def _tables(folder: Path) -> tuple[Path, dict[str, Path], dict[str, Any]]:
    """A base of many positions, in the form that keeps tables of them."""
    base = _llama(folder, max_position_embeddings=2048, num_hidden_layers=1, head_dim=16)
    targets = ["q_proj", "v_proj"]
    return base, {"plain": make_adapter(base, folder / "plain", 1, r=4, target_modules=targets)}, {}


def _sentences(folder: Path) -> tuple[Path, dict[str, Path], dict[str, Any]]:
    """An embedding model as sentence-transformers writes it, its pooling in a folder of its own."""
    base = Path(shutil.copytree(_MODELS / "tiny-bert", folder / "base"))
    kinds = {"Transformer": "", "Pooling": "pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.{kind}"}
        for index, (kind, path) in enumerate(kinds.items())
    ]
    (base / "pooling").mkdir()
    prompts = {"prompts": {"query": "river "}, "default_prompt_name": "query"}
    for name, data in (
        ("modules.json", modules),
        ("pooling/config.json", {"pooling_mode": "mean", "embedding_dimension": 128}),
        ("config_sentence_transformers.json", prompts),
    ):
        (base / name).write_text(json.dumps(data), encoding="utf-8")
    return base, {}, {"task": "feature-extraction"}


def _pictures(folder: Path) -> tuple[Path, dict[str, Path], dict[str, Any]]:
    base = make_encoder("vit", "image-classification", folder / "base")
    transformers.ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(base)
    return base, {}, {}


def _merged(folder: Path) -> tuple[Path, dict[str, Path], dict[str, Any]]:
    """A base whose weights are on a grid, and an adapter whose changes are below its step."""
    base = _llama(folder)
    file = base / "model.safetensors"
    tensors = st.load_file(file)
    st.save_file(
        {key: (np.round(x / GRID) * GRID).astype(np.float32) for key, x in tensors.items()},
        file,
        {"format": "pt"},
    )
    small = make_adapter(
        base, folder / "small", 1, r=4, lora_alpha=1, target_modules=["v_proj", "o_proj"]
    )
    weights = small / "adapter_model.safetensors"
    factors = st.load_file(weights)
    scaled = {k: v * np.float32(0.2 if "lora_B" in k else 1) for k, v in factors.items()}
    st.save_file(scaled, weights, {"format": "pt"})
    return base, {"small": small}, {"mode": "merged", "form": "portable"}


def _random(family: str, seed: int, **options: Any) -> Maker:
    """A base of a family with adapters of random kinds, ranks, scales and layers."""

    def make(folder: Path) -> tuple[Path, dict[str, Path], dict[str, Any]]:
        base = make_base(family, folder / "base", max_position_embeddings=_POSITIONS)
        leaves = _linear_leaves(base)
        random = np.random.default_rng(seed)
        count = 1 if options.get("mode") == "merged" else 3
        adapters = {}
        for index in range(count):
            targets = sorted(random.choice(leaves, random.integers(1, len(leaves)), replace=False))
            adapters[f"random-{index}"] = make_adapter(
                base,
                folder / f"random-{index}",
                seed + index,
                r=int(random.integers(1, 9)),
                lora_alpha=int(random.integers(1, 17)),
                target_modules=[str(leaf) for leaf in targets],
                rank_pattern={str(targets[0]): int(random.integers(1, 6))},
                use_rslora=bool(random.integers(2)),
                use_dora=index == 2,
                layers_to_transform=[int(random.integers(2))] if random.integers(3) == 0 else None,
            )
        return base, adapters, options

    return make


def _linear_leaves(base: Path) -> list[str]:
    from torch.nn import Linear

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    head = model.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, Linear) and module is not head
        }
    )


_RANDOM: dict[str, dict[str, Any]] = {
    "qwen2": {}, "gemma2": {}, "mistral": {"form": "portable"}, "phi3": {}, "opt": {},
    "gpt_neox": {"form": "portable"}, "gemma3_text": {}, "olmo2": {"form": "portable"},
    "granite": {}, "smollm3": {}, "qwen3": {"form": "portable"}, "llama": {"mode": "merged"},
}  # fmt: skip
_WORLDS: dict[str, Maker] = {
    "portable": _portable,
    "fused": _fused,
    "kinds": _kinds,
    "gpt2": _gpt2,
    "heads": _heads,
    "merged": _merged,
    "far": _far,
    "experts": _experts,
    "texts": _texts,
    "tables": _tables,
    "sentences": _sentences,
    "pictures": _pictures,
    **{
        f"random {family}": _random(family, seed, **options)
        for seed, (family, options) in enumerate(_RANDOM.items())
    },
}
HEALTHY = tuple(_WORLDS)
"""Every world, as it was exported, must pass."""
