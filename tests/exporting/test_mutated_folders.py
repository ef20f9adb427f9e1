"""What PEFT loads of mutated folders: its own missing and unexpected keys beside ours."""

from __future__ import annotations

import json
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_edge.adapter.loading import BaseView, check_loading, loading
from lora_edge.adapter.targets import Targets, pattern_key
from lora_edge.base.checkpoint import resolve_base
from lora_edge.base.layers import built_layers
from lora_edge.errors import AdapterError
from lora_edge.names import parse_peft_key
from lora_edge.tasks.task import TEXT
from tests.support.families import make_base
from tests.support.kinds import Row, make_kind

MUTANTS = 48
Config = dict[str, Any]
Tensors = dict[str, Any]
_NAMES = ("q_proj", "v_proj", "k_proj", "o_proj", "up_proj", "embed_tokens", "lm_head")
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "dora": {"target_modules": ["q_proj", "o_proj"], "use_dora": True},
    "layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "norm": {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]},
    "tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": [3]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
}
FIELDS: dict[str, Callable[[random.Random], Any]] = {
    "target_modules": lambda r: r.choice(
        [
            r.sample(_NAMES, r.randint(1, 4)),
            r".*\.(0|1)\..*(q|v)_proj",
            r"model\.layers\.1\..*_proj",
            "all-linear",
            [f"layers.{r.randint(0, 1)}.self_attn.{r.choice(_NAMES[:4])}"],
        ]
    ),
    "layers_to_transform": lambda r: r.choice([None, [], 0, 1, [0], [1], [0, 1], [5]]),
    "layers_pattern": lambda r: r.choice([None, [], "layers", ["h", "layers"], "h"]),
    "exclude_modules": lambda r: r.choice(
        [None, [r.choice(_NAMES)], rf".*\.{r.randint(0, 1)}\..*", ["layers.0.self_attn.q_proj"]]
    ),
    "modules_to_save": lambda r: r.choice([None, [], ["norm"], ["lm_head"], ["embed_tokens"]]),
    "use_dora": lambda r: r.random() < 0.5,
    "lora_bias": lambda r: r.random() < 0.5,
    "ensure_weight_tying": lambda r: r.random() < 0.5,
    "trainable_token_indices": lambda r: r.choice([None, [3], {"embed_tokens": [3]}]),
}
_SEGMENTS = ("_orig_mod", "module", "default", "model", "base_layer", "base_model.model")


def _mutate(rng: random.Random, config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    for _ in range(rng.randint(1, 2)):
        if rng.random() < 0.6:
            field = rng.choice(list(FIELDS))
            config = config | {field: FIELDS[field](rng)}
            continue
        whole = rng.random() < 0.3
        chosen = list(tensors) if whole else [rng.choice(list(tensors))]
        segment, kind = rng.choice(_SEGMENTS), rng.choice(["drop", "insert", "layer"])
        place = rng.randint(0, 3)
        found: Tensors = {}
        for key, value in tensors.items():
            parts = key.split(".")
            if key not in chosen:
                found[key] = value
            elif kind == "insert":
                found[".".join([*parts[:place], segment, *parts[place:]])] = value
            elif kind == "layer":
                found[key.replace("layers.0", "layers.3")] = value
            elif whole:
                found[key.replace(".weight", ".default.weight")] = value
        tensors = found
    return config, tensors


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "base"
    return make_base("llama", directory, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def view(base: Path) -> BaseView:
    built = built_layers(resolve_base(base), TEXT)
    return BaseView(built.modules, built.tied, built.output)


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("saved")
    return {
        kind: make_kind(base, Row("llama", settings), root / kind)
        for kind, settings in KINDS.items()
    }


@pytest.mark.parametrize("seed", range(MUTANTS))
def test_a_mutant_is_loaded_as_peft_loads_it(
    seed: int, base: Path, view: BaseView, saved: dict[str, Path], tmp_path: Path
) -> None:
    rng = random.Random(seed)
    source = saved[rng.choice(list(saved))]
    config, tensors = _mutate(
        rng,
        json.loads((source / "adapter_config.json").read_text()),
        load_file(source / "adapter_model.safetensors"),
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    found = loading(config, list(tensors), view)
    model = AutoModelForCausalLM.from_pretrained(base)
    result, raised = None, ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = PeftModel.from_pretrained(model, tmp_path).load_adapter(tmp_path, "default")
    except Exception as error:  # noqa: BLE001 - whatever PEFT raises, we must not take the folder
        raised = str(error) or repr(error)
    if result is None:
        shapes = "size mismatch" in raised  # refused where the tensors are read
        assert shapes or found.failure or found.unexpected or found.missing, raised
        return
    assert not found.failure
    unknown = {
        key
        for key in tensors
        if (parsed := parse_peft_key(key)) is None
        or (parsed.path not in view.layers and parsed.path.rpartition(".")[0] not in view.layers)
    }
    ours = {re.sub("_vector$", "_vector.weight", key) for key in {*found.unexpected, *unknown}}
    assert ours == set(result.unexpected_keys)
    missing = {key.replace(".default", "") for key in result.missing_keys}
    assert set(found.missing) == {key.replace("_vector.weight", "_vector") for key in missing}
    if found.unexpected or found.missing:
        with pytest.raises(AdapterError, match=r"PEFT (drops|lacks) \d+"):
            check_loading(config, list(tensors), view, "it")


def test_the_first_pattern_key_decides() -> None:
    keys = {r"layers\.0\..*": 1, "q_proj": 2, "^model": 3}
    assert pattern_key(keys, "model.layers.0.self_attn.q_proj") == r"layers\.0\..*"
    assert pattern_key(keys, "model.layers.1.self_attn.q_proj") == "q_proj"
    assert pattern_key(keys, "model.layers.1.self_attn.k_proj") is None


def test_a_full_path_is_named_whatever_its_layer() -> None:
    targets = Targets({"target_modules": ["a.0.q"], "layers_to_transform": [1]})
    assert targets.decide("a.0.q").hit
    assert not targets.decide("b.a.0.q").hit
