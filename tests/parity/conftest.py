"""A tiny random Llama and three unlike adapters on disk, made with transformers and peft."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

from lora_edge.base.checkpoint import Base, resolve_base
from tests.support.families import make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    sizes = {"initializer_range": 0.1, "tie_word_embeddings": True}
    return resolve_base(make_base("llama", tmp_path_factory.mktemp("base"), **sizes))


@pytest.fixture(scope="session")
def adapters(base: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``narrow``: r = 3 on q and v; ``rooted``: rsLoRA r = 5 on all; ``varied``: patterns."""
    return {
        "narrow": make_adapter(
            base, tmp_path_factory.mktemp("narrow"), 1, r=3, alpha=6, targets=["q_proj", "v_proj"]
        ),
        "rooted": make_adapter(
            base, tmp_path_factory.mktemp("rooted"), 2, r=5, alpha=4, use_rslora=True
        ),
        "varied": make_adapter(
            base,
            tmp_path_factory.mktemp("varied"),
            3,
            r=4,
            alpha=8,
            targets=["q_proj", "o_proj", "down_proj"],
            rank_pattern={"o_proj": 2},
            alpha_pattern={"down_proj": 3},
        ),
    }


@pytest.fixture(scope="session")
def exported(
    base: Base, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle of ``narrow`` and ``rooted``, not to be changed."""
    from lora_edge.exporting.export import export

    output = tmp_path_factory.mktemp("exported") / "out"
    two = {name: adapters[name] for name in ("narrow", "rooted")}
    export(base.directory, two, output=output, form="portable")
    return output


@pytest.fixture(scope="session")
def shipped_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two of the adapters that ship, not to be changed."""
    from tests.support.shipped import export_text

    return export_text(tmp_path_factory.mktemp("shipped") / "out", "echo", "mirror")


@dataclass(frozen=True)
class Made:
    """A base whose heads have a size that both forms take, an adapter's bundle in each of them."""

    base: Base
    switchable: dict[str, Path]
    merged: Path


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """``rooted`` and ``narrow`` in both forms, ``rooted`` merged; embedding and head untied."""
    from lora_edge.exporting.export import export

    root = tmp_path_factory.mktemp("made")
    base = resolve_base(make_base("llama", root / "base"))
    adapters = {
        "narrow": make_adapter(
            base, root / "narrow", 1, r=3, alpha=6, targets=["q_proj", "v_proj"]
        ),
        "rooted": make_adapter(base, root / "rooted", 2, r=5, alpha=4, use_rslora=True),
    }
    switchable = {}
    for form in ("fused", "portable"):
        switchable[form] = root / form
        export(base.directory, adapters, output=root / form, form=form)
    one = {"rooted": adapters["rooted"]}
    export(base.directory, one, "merged", root / "merged", form="fused")
    return Made(base, switchable, root / "merged")


def make_adapter(
    base: Base,
    directory: Path,
    seed: int,
    *,
    r: int,
    alpha: float,
    targets: list[str] | str = "all-linear",
    size: float = 0.3,
    **fields: object,
) -> Path:
    """A PEFT directory with random factors; B is scaled by ``size`` (0: a fresh adapter)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base.directory)
    config = LoraConfig(
        r=r, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM", **fields
    )
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5 for an attribute by its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * size)
    wrapped.save_pretrained(directory)
    saved = directory / "adapter_config.json"
    assert json.loads(saved.read_text())["r"] == r
    return directory
