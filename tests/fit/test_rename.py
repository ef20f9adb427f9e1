"""Old names of modules, text parts of vision-language models, and parts that nobody reads."""

from __future__ import annotations

import itertools
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import lora_edge
from lora_edge.adapter.load import load_adapter
from lora_edge.base.checkpoint import resolve_base
from lora_edge.bundle.onnx_adapter import read_adapter
from lora_edge.errors import UnsupportedAdapterError
from lora_edge.fit.compare import Fit
from lora_edge.fit.rename import SINCE_5, fitted_to, new_names
from lora_edge.tasks.task import TEXT, Task
from tests.support.examples import examples
from tests.support.saving import load_model, perturb, save_model

pytestmark = pytest.mark.skipif(
    transformers.__version__ < "5", reason="transformers 5 has renamed the modules"
)
_BEFORE_5 = {
    "vit": (
        (r"(?<!encoder\.)layers\.", "encoder.layer."),
        (r"attention\.q_proj", "attention.attention.query"),
        (r"attention\.v_proj", "attention.attention.value"),
        (r"attention\.o_proj", "attention.output.dense"),
        (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"),
    ),
    "dinov2": (
        (r"attention\.q_proj", "attention.attention.query"),
        (r"attention\.v_proj", "attention.attention.value"),
        (r"attention\.o_proj", "attention.output.dense"),
    ),
}  # fmt: skip
_SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.2,
}  # fmt: skip
_IMAGE = _SMALL | {"image_size": 24, "patch_size": 8, "num_labels": 3, "mlp_ratio": 2}
_TEXT = _SMALL | {"vocab_size": 99, "max_position_embeddings": 130, "pad_token_id": 0}
_LLAMA = _TEXT | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}


def _make(model_type: str, auto: str, fields: dict[str, Any], folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[model_type](**fields)
    model = getattr(transformers, auto).from_config(config)
    perturb(model.parameters())
    return save_model(model, folder)


def _adapter(base: Path, auto: str, folder: Path, **settings: Any) -> Path:
    torch.manual_seed(1)
    model = load_model(getattr(transformers, auto), base)
    config = LoraConfig(**{"r": 3, "lora_alpha": 4, "init_lora_weights": False} | settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(model, config).save_pretrained(folder)
    return folder


def _with_names(adapter: Path, rules: Any, folder: Path, **config: Any) -> Path:
    """The adapter as it would have been saved with other names of modules."""
    folder.mkdir()
    own = json.loads((adapter / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(own))
    tensors = {}
    for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.")
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        tensors[f"base_model.model.{name}"] = tensor.to(torch.bfloat16)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("family", examples(_BEFORE_5, sorted(_BEFORE_5)[:1]))
def test_adapters_from_before_transformers_5(family: str, tmp_path: Path) -> None:
    """Exported as the same adapter with today's names is, and proved against PEFT with those."""
    auto = Task("image-classification").loader
    base = _make(family, auto, _IMAGE, tmp_path / "base")
    names = ["q_proj", "v_proj", "o_proj", "fc1"]
    made = _adapter(
        base, auto, tmp_path / "made",
        target_modules=names, rank_pattern={"v_proj": 5}, alpha_pattern={"o_proj": 9},
    )  # fmt: skip
    today = _with_names(made, (), tmp_path / "today")
    old = _with_names(
        made, _BEFORE_5[family], tmp_path / "old",
        target_modules=["query", "value", "dense", "fc1"],
        rank_pattern={"value": 5}, alpha_pattern={"attention.output.dense": 9},
    )  # fmt: skip
    assert any("attention.attention.query" in path for path in load_adapter(old, "a").modules)
    said: list[str] = []
    bundle = lora_edge.export(
        base, {"old": old, "today": today}, output=tmp_path / "out", progress=said.append
    )
    assert any("renamed" in line for line in said)
    tensors = [read_adapter(bundle.directory / bundle.adapter(x).file) for x in ("old", "today")]
    assert sorted(tensors[0]) == sorted(tensors[1])
    for name, array in tensors[0].items():
        np.testing.assert_array_equal(array, tensors[1][name])
    kept = bundle.directory / "adapters" / "old" / "peft"
    assert (kept / "original_config.json").is_file()
    again = lora_edge.export(base, {"old": old}, "merged", tmp_path / "merged")
    assert again.manifest.adapters["old"].proved
    # inspect and add decide alike
    fit = Fit(load_adapter(old, "old"), resolve_base(base), None)
    assert fit.refusals() == []
    assert any("renamed" in line for line in fit.warnings)
    added = lora_edge.add(bundle, {"again": old})
    for name, array in read_adapter(added_file(bundle, added, "again")).items():
        np.testing.assert_array_equal(array, tensors[1][name])


def added_file(bundle: Any, manifest: Any, name: str) -> Path:
    """The file of an adapter that was added."""
    entries = getattr(manifest, "manifest", manifest).adapters
    path: Path = bundle.directory / entries[name].file
    return path


@pytest.mark.parametrize("model_type", sorted(SINCE_5))
def test_the_rules_are_transformers_own(model_type: str) -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    config = transformers.CONFIG_MAPPING[model_type]()
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    theirs = [
        (pattern.replace("\\", ""), new)
        for rule in get_model_conversion_mapping(model, add_legacy=False)
        if type(rule) is WeightRenaming
        for pattern, new in zip(rule.source_patterns, rule.target_patterns, strict=True)
        if "position_bias" not in new
    ]
    ours = [(pattern.replace("\\", ""), new) for pattern, new in SINCE_5[model_type]]
    assert ours == theirs


@pytest.mark.parametrize(
    ("rules", "targets"),
    examples(
        [
            (((r"^model\.", "model.language_model."),), ["q_proj", "down_proj"]),
            (
                ((r"^model\.", "model.language_model."),),
                r"^(?!.*visual).*(?:q_proj|down_proj)$",
            ),
            (((r"^model\.", "language_model.model."),), ["q_proj", "down_proj"]),
            (((r"^model\.", "model.text_model."),), r".*text_model.*\.(q_proj|down_proj)"),
        ],
        lambda row: "visual" in row[1],
    ),
)
def test_the_text_part_of_a_vision_language_model(rules: Any, targets: Any, tmp_path: Path) -> None:
    base = _make("llama", "AutoModelForCausalLM", _LLAMA, tmp_path / "base")
    made = _adapter(
        base, "AutoModelForCausalLM", tmp_path / "made",
        target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    adapter = _with_names(made, rules, tmp_path / "a", target_modules=targets)
    today = _with_names(made, (), tmp_path / "today")
    bundle = lora_edge.export(base, {"a": adapter, "t": today}, output=tmp_path / "out")
    tensors = [read_adapter(bundle.directory / bundle.adapter(x).file) for x in ("a", "t")]
    for name, array in tensors[0].items():
        np.testing.assert_array_equal(array, tensors[1][name])


def _paths(folder: Path, paths: tuple[str, ...]) -> Any:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for path in paths:
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.ones(2, 8)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.ones(8, 2)
    save_file(tensors, folder / "adapter_model.safetensors")
    return load_adapter(folder, "own")


def test_the_images_part_is_left_out_and_said(tmp_path: Path) -> None:
    paths = ("model.language_model.layers.0.q_proj", "model.visual.blocks.0.attn.proj")
    said: list[str] = []
    adapter = _paths(tmp_path / "a", paths)
    with fitted_to([adapter], {"model.layers.0.q_proj"}, "llama", TEXT, said.append) as found:
        assert set(found[0].modules) == {"model.layers.0.q_proj"}
        assert set(found[0].config["target_modules"]) == {"model.layers.0.q_proj"}
    assert any("model.visual.blocks.0.attn.proj" in line for line in said)
    with (
        pytest.raises(UnsupportedAdapterError, match="nothing else") as caught,
        fitted_to([_paths(tmp_path / "v", paths[1:])], {"x"}, "llama", TEXT, said.append),
    ):
        pass
    assert caught.value.hint


def test_a_name_is_changed_only_if_every_module_is_then_the_bases(tmp_path: Path) -> None:
    paths = ("model.language_model.layers.0.q_proj", "model.language_model.layers.9.q_proj")
    adapter = _paths(tmp_path / "a", paths)
    assert new_names(adapter, {"model.layers.0.q_proj"}, "llama") == {}


@pytest.mark.parametrize(
    ("model", "mode"),
    examples(
        itertools.product(("BertModel", "BertForMaskedLM"), ("switchable", "merged")),
        [("BertModel", "switchable"), ("BertForMaskedLM", "merged")],
    ),
)
def test_a_pooler_that_features_do_not_pass_through(model: str, mode: Any, tmp_path: Path) -> None:
    """``dense`` hits the pooler too; a masked language model's checkpoint has none."""
    base = _make("bert", "AutoModel", _TEXT, tmp_path / "base")
    adapter = _adapter(
        base, "AutoModel", tmp_path / "a",
        target_modules=["query", "value", "dense"], task_type="FEATURE_EXTRACTION", bias="all",
    )  # fmt: skip
    assert any("pooler" in path for path in load_adapter(adapter, "a").modules)
    if model == "BertForMaskedLM":
        base = save_model(load_model(transformers.BertForMaskedLM, base), tmp_path / "masked")
    said: list[str] = []
    bundle = lora_edge.export(base, {"a": adapter}, mode, tmp_path / "out", progress=said.append)
    assert bundle.manifest.task == "feature-extraction"
    assert any("pooler" in line for line in said)
    fit = Fit(load_adapter(adapter, "a"), resolve_base(base), None)
    assert fit.refusals() == []
    assert any("pooler" in line for line in fit.warnings)


def test_a_pooler_alone_is_refused(tmp_path: Path) -> None:
    adapter = _paths(tmp_path / "a", ("pooler.dense",))
    task = Task("feature-extraction")
    with (
        pytest.raises(UnsupportedAdapterError, match="pooler") as caught,
        fitted_to([adapter], {"encoder"}, "bert", task, lambda _: None),
    ):
        pass
    assert caught.value.hint
