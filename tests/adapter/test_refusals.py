"""What is refused by name: the field or tensor, the mode and a way out that is there; nothing else.

Adapters of other PEFT types are in ``test_convert.py``.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_edge.adapter.load import load_adapter
from lora_edge.adapter.parts import LowRank, TokenRows
from lora_edge.adapter.refusals import MODES, Mode
from lora_edge.adapter.types import MERGE_FIRST
from lora_edge.bundle.part import SiteEntry
from lora_edge.cli import main
from lora_edge.errors import AdapterError, UnsupportedAdapterError
from lora_edge.fit.check import check_copies, check_modules
from tests.support.families import make_base
from tests.support.paths import MODELS

SHOUT = MODELS / "adapters" / "shout"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
EMBEDDING = "base_model.model.model.embed_tokens"
CONVERT = "path_initial_model_for_weight_conversion"
RESAVE = "save it again"
Tensors = dict[str, Any]


class Row(NamedTuple):
    """An adapter that is refused.

    Attributes:
        config: fields that differ from shout's, a plain LoRA of rank 8 on q_proj and v_proj.
        named: what the message names.
        way_out: what the hint says.
        modes: that refuse it.
        tensors: changes shout's tensors.
        damaged: it contradicts itself: an error of the adapter, not of what a mode can do.
    """

    config: dict[str, Any]
    named: str
    way_out: str
    modes: tuple[Mode, ...] = MODES
    tensors: Callable[[Tensors], Tensors] = lambda tensors: tensors
    damaged: bool = False


def _without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: x for key, x in tensors.items() if part not in key}


def _with(key: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {key: np.full(shape, 0.5, np.float32)}


ALORA = {"alora_invocation_tokens": [7, 9]}
ROWS: dict[str, Row] = {
    "layer_replication": Row(
        {"layer_replication": [[0, 2], [1, 3]]}, "layer_replication", "a base of its own"
    ),
    "pissa": Row({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'", CONVERT),
    "pissa, fast": Row(
        {"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16'", CONVERT
    ),
    "olora": Row({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'", CONVERT),
    "corda": Row(
        {"init_lora_weights": "corda", "corda_config": {"corda_method": "ipm"}},
        "init_lora_weights is 'corda'",
        CONVERT,
    ),
    "lora_ga": Row({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'", CONVERT),
    # Its base is quantized besides, so a difference of factors is not the whole change.
    "loftq": Row(
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        "init_lora_weights is 'loftq'",
        "model.unload()",
    ),
    # PEFT refuses to convert this one.
    "pissa, rslora, patterns": Row(
        {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 8}},
        "init_lora_weights",
        "model.unload()",
    ),
    "an unknown init": Row({"init_lora_weights": "brand_new"}, "brand_new", "model.unload()"),
    "arrow": Row({"arrow_config": {"top_k": 3}}, "arrow_config", "one by one"),
    "qalora": Row({"use_qalora": True}, "use_qalora", "Train a plain LoRA"),
    "bdlora": Row({"use_bdlora": {"nblocks": 2}}, "use_bdlora", MERGE_FIRST),
    "kasa": Row({"kasa_config": {"beta": 1e-4}}, "kasa_config", MERGE_FIRST),
    "an unknown field": Row({"brand_new": 3}, "brand_new is 3", "Update lora-edge"),
    "an unknown bias": Row({"bias": "some"}, "bias is 'some'", "correct it"),
    "dora and lora_bias": Row(
        {"use_dora": True, "lora_bias": True}, "use_dora and lora_bias", "one of the two"
    ),
    "alora merged": Row(ALORA, "alora_invocation_tokens is [7, 9]", "switchable", ("merged",)),
    "alora and dora": Row(ALORA | {"use_dora": True}, "use_dora", "low-rank factors only"),
    "alora and lora_bias": Row(ALORA | {"lora_bias": True}, "lora_bias", "low-rank factors only"),
    "alora and bias": Row(ALORA | {"bias": "all"}, "bias is 'all'", "low-rank factors only"),
    "alora and modules_to_save": Row(
        ALORA | {"modules_to_save": ["norm"]}, "modules_to_save", "low-rank factors only"
    ),
    "alora and tokens": Row(
        ALORA | {"trainable_token_indices": [3]},
        "trainable_token_indices",
        "low-rank factors only",
    ),
    "alora and target_parameters": Row(
        ALORA | {"target_parameters": ["experts.up"]}, "target_parameters", "low-rank factors only"
    ),
    "target_parameters switchable": Row(
        {"target_parameters": ["mlp.experts.up"]},
        "target_parameters is ['mlp.experts.up']",
        "--mode merged",
        ("switchable",),
    ),
    "an unknown tensor": Row(
        {}, f"{QUERY}.lora_diag", MERGE_FIRST, tensors=_with(f"{QUERY}.lora_diag", 8)
    ),
    "an unknown wrapper": Row(
        {},
        "modules_to_save.default",
        "Rename the keys",
        tensors=_with("base_model.model.lm_head.modules_to_save.default.weight", 264, 192),
    ),
    # PEFT's wrappers were subclasses of Linear once, and today's PEFT drops such keys.
    "a bias as old releases saved it": Row(
        {"bias": "lora_only"},
        f"{QUERY}.bias",
        f"Rename it to {QUERY}.base_layer.bias",
        tensors=_with(f"{QUERY}.bias", 192),
    ),
    "a wrong rank": Row({"r": 4}, "rank 8, but the config says 4", RESAVE, damaged=True),
    "a wrong rank by pattern": Row(
        {"rank_pattern": {"v_proj": 2}}, "v_proj has rank 8", RESAVE, damaged=True
    ),
    "a magnitude without factors": Row(
        {"use_dora": True},
        "o_proj.lora_magnitude_vector: target_modules is",
        RESAVE,
        tensors=_with(f"{QUERY.replace('q_proj', 'o_proj')}.lora_magnitude_vector", 192),
        damaged=True,
    ),
    "dora without a magnitude": Row(
        {"use_dora": True}, "lacks a lora_magnitude_vector", RESAVE, damaged=True
    ),
    "a magnitude without dora": Row(
        {},
        "lora_magnitude_vector: use_dora is False",
        RESAVE,
        tensors=_with(f"{QUERY}.lora_magnitude_vector", 192),
        damaged=True,
    ),
    "a bias of B without lora_bias": Row(
        {},
        "lora_B.bias: lora_bias is False",
        RESAVE,
        tensors=_with(f"{QUERY}.lora_B.bias", 192),
        damaged=True,
    ),
    "no B": Row(
        {}, "has no lora_B", "Save the adapter again", tensors=_without("lora_B"), damaged=True
    ),
    "token rows without their tensor": Row(
        {"trainable_token_indices": [3]},
        "trainable_token_indices",
        "Save the adapter again",
        damaged=True,
    ),
    "fewer token rows than tokens": Row(
        {"trainable_token_indices": [3, 4]},
        "1 trained token rows",
        RESAVE,
        tensors=_with(f"{EMBEDDING}.token_adapter.trainable_tokens_delta", 1, 192),
        damaged=True,
    ),
}  # fmt: skip


def make_row(row: Row, directory: Path) -> Path:
    shutil.copytree(SHOUT, directory)
    config = json.loads((directory / CONFIG).read_text()) | row.config
    (directory / CONFIG).write_text(json.dumps(config))
    save_file(row.tensors(load_file(SHOUT / WEIGHTS)), directory / WEIGHTS)
    return directory


@pytest.fixture
def failing(
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Callable[..., tuple[str, str]]]:
    """Run a command that must exit with 2, and give its error and its hint."""
    terminated = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> tuple[str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert (stopped.value.code, out) == (2, "")
        error, hint = err.splitlines()
        assert error.startswith("error: ")
        assert hint.startswith("hint: ")
        return error, hint

    yield call
    signal.signal(signal.SIGTERM, terminated)


@pytest.mark.parametrize("name", ROWS)
def test_refused_by_name(
    name: str, failing: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    row = ROWS[name]
    adapter = make_row(row, tmp_path / "adapter")
    for mode in MODES:
        if mode not in row.modes:
            load_adapter(adapter).check_mode(mode)
            continue
        error, hint = failing(
            "export", MODELS / "tiny-llama", "-a", f"x={adapter}", "-o", tmp_path / "out",
            "--mode", mode,
        )  # fmt: skip
        assert row.named in error
        assert row.way_out in hint
        if not row.damaged:
            assert "in both modes" in error or f"in {mode} mode" in error
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_the_rows_change_is_all_that_is_wrong(tmp_path: Path) -> None:
    for mode in MODES:
        load_adapter(make_row(Row({}, "", ""), tmp_path / mode)).check_mode(mode)


def test_a_pickle_is_refused(failing: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    adapter = make_row(Row({}, "", ""), tmp_path / "adapter")
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    error, hint = failing(
        "export", MODELS / "tiny-llama", "-a", f"x={adapter}", "-o", tmp_path / "out"
    )
    assert "adapter_model.bin is a pickle" in error
    assert "safe_serialization=True" in hint
    assert not (tmp_path / "out").exists()


MIXER = "model.layers.0.mixer"
LAYERS = {
    "model.layers.0.self_attn.q_proj": SiteEntry(192, 192),
    "model.layers.0.self_attn.v_proj": SiteEntry(192, 64),
    f"{MIXER}.up": SiteEntry(192, 384),
    "model.embed_tokens": SiteEntry(264, 192, "embedding"),
}


@pytest.mark.parametrize(
    ("parameter", "shape"),
    [
        (f"{MIXER}.A_log", (16,)),  # a parameter of a block itself
        (f"{MIXER}.weight", (192, 4, 1)),  # a module of a kind that is no layer
        ("model.embed_tokens.bias", (192,)),
        ("model.layers.0.batch_norm.running_mean", (192,)),
    ],
)
def test_what_is_saved_and_no_layer_is_refused(
    parameter: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    module = parameter.rpartition(".")[0]
    row = Row(
        {"modules_to_save": [module]}, "", "",
        tensors=lambda tensors: {
            **{key: value for key, value in tensors.items() if "layers.0" in key},
            f"base_model.model.{MIXER}.up.weight": np.ones((384, 192), np.float32),
            f"base_model.model.{parameter}": np.ones(shape, np.float32),
        },
    )  # fmt: skip
    adapter = load_adapter(make_row(row, tmp_path / "adapter"))
    with pytest.raises(UnsupportedAdapterError, match=r"both modes: it replaces") as caught:
        check_modules(adapter, LAYERS, "the base")
    assert parameter in str(caught.value)
    assert "merge_and_unload" in caught.value.hint
    kept = {path: value for path, value in adapter.saved.items() if path != parameter}
    check_modules(dataclasses.replace(adapter, saved=kept), LAYERS, "the base")


@pytest.mark.parametrize(
    ("parameter", "shape"),
    [("mixer.up.weight", (192, 384)), ("mixer.up.bias", (192,)), ("mixer.up.weight", (384, 190))],
)
def test_what_is_saved_in_another_shape_is_named(
    parameter: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    row = Row(
        {"modules_to_save": ["up"]}, "", "",
        tensors=lambda tensors: {
            **{key: value for key, value in tensors.items() if "layers.0" in key},
            f"base_model.model.model.layers.0.{parameter}": np.ones(shape, np.float32),
        },
    )  # fmt: skip
    adapter = load_adapter(make_row(row, tmp_path / "adapter"))
    with pytest.raises(AdapterError, match="replaces") as caught:
        check_modules(adapter, LAYERS, "the base")
    assert parameter in str(caught.value)
    assert str(shape) in str(caught.value)
    assert "another base" in caught.value.hint


def test_every_field_of_pefts_config_at_its_default_is_taken(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"])
    fields = {field.name for field in dataclasses.fields(config)}
    defaults = {name: getattr(config, name) for name in fields} | config.to_dict()
    defaults |= {
        "peft_type": "LORA",
        "target_modules": sorted(config.target_modules),
        "runtime_config": dataclasses.asdict(config.runtime_config),
    }
    assert len(defaults) >= 40
    adapter = load_adapter(make_row(Row(defaults, "", ""), tmp_path / "adapter"))
    for mode in MODES:
        adapter.check_mode(mode)
    assert adapter.modules
    assert not adapter.saved


@pytest.mark.parametrize(
    "fields",
    [
        *({"init_lora_weights": x} for x in (True, False, "gaussian", "eva", "orthogonal", "mica")),
        {"init_lora_weights": "Gaussian"},
        {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"},
        {"loftq_config": None, "corda_config": {"corda_method": "ipm"}},
        {"layer_replication": []},
        {"lora_dropout": 0.3, "exclude_modules": ["k_proj"], "layers_to_transform": [0, 1, 2]},
        {"megatron_config": {"a": 1}, "revision": "main", "qalora_group_size": 8},
        {"runtime_config": {"ephemeral_gpu_offload": True}, "ensure_weight_tying": True},
        {"velora_config": {"num_groups": 8}},
        {"monteclora_config": {"num_samples": 8}},
        {"brand_new": None, "another": False, "third": []},
        {"alora_invocation_tokens": [], "modules_to_save": [], "trainable_token_indices": {}},
    ],
    ids=str,
)
def test_what_changes_no_number_is_taken(fields: dict[str, Any], tmp_path: Path) -> None:
    adapter = load_adapter(make_row(Row(fields, "", ""), tmp_path / "adapter"))
    for mode in MODES:
        adapter.check_mode(mode)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("llama", tmp_path_factory.mktemp("base"))


MERGEABLE: dict[str, dict[str, Any]] = {
    "use_bdlora": {
        "use_bdlora": BdLoraConfig(
            target_modules_bd_a=["q_proj"], target_modules_bd_b=["down_proj"], nblocks=2
        )
    },
    "kasa_config": {"kasa_config": KasaConfig()},
}


@pytest.mark.parametrize("field", MERGEABLE)
def test_peft_merges_what_the_hint_says_it_merges(field: str, tiny: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False,
        task_type="CAUSAL_LM", **MERGEABLE[field],
    )  # fmt: skip
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedAdapterError, match=field) as caught:
        load_adapter(tmp_path / "adapter")
    assert caught.value.hint == MERGE_FIRST
    ids = torch.tensor(np.random.default_rng(0).integers(0, 256, (2, 9)))
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(tiny)(ids).logits
        unmerged = adapted(ids).logits
        merged = adapted.merge_and_unload()(ids).logits
    torch.testing.assert_close(merged, unmerged, atol=1e-4, rtol=0)
    assert (unmerged - before).abs().max() > 0.1


def _resized(part: str) -> dict[str, Any]:
    """Parts of an adapter for a vocabulary of 14 tokens; the base's has 11."""
    rows = np.ones((14, 8), np.float32)
    if part == "tokens":
        return {
            "tokens": {"model.embed_tokens": TokenRows("model.embed_tokens", (3, 13), rows[:2])}
        }
    if part == "saved":
        return {"saved": {"model.embed_tokens.weight": rows}}
    if part == "head":
        return {"saved": {"lm_head.weight": rows}}
    if part == "copy":
        return {"base_copies": {"lm_head.weight": rows}}
    pair = {"alpha": 2.0, "scaling": 1.0}
    if part == "pair on the head":
        own = LowRank("lm_head", "linear", np.ones((2, 8)), np.ones((14, 2)), **pair)
    else:
        own = LowRank("model.embed_tokens", "embedding", np.ones((2, 14)), np.ones((8, 2)), **pair)
    return {"modules": {own.path: own}}


@pytest.mark.parametrize("part", ["tokens", "saved", "head", "copy", "pair", "pair on the head"])
def test_a_resized_vocabulary_is_called_that(part: str) -> None:
    fields = ("modules", "saved", "tokens", "stacked", "base_copies")
    empty: dict[str, Any] = {field: {} for field in fields}
    adapter = dataclasses.replace(load_adapter(SHOUT), **(empty | _resized(part)))
    layers = {
        "model.embed_tokens": SiteEntry(11, 8, kind="embedding"),
        "lm_head": SiteEntry(8, 11),
    }

    def check() -> None:
        check_modules(adapter, layers, "the base")
        check_copies(adapter, lambda _: np.zeros((11, 8), np.float32), ())

    with pytest.raises(AdapterError) as caught:
        check()
    assert all(
        x in caught.value.hint for x in ("vocabulary was resized", "14", "11", "resized base")
    )
