"""Adapters in layouts that old releases of PEFT wrote, by hand; and what they do, by hand too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

import lora_edge
from tests.support.examples import examples
from tests.support.families import make_base

IDS = np.random.default_rng(6).integers(0, 256, (2, 10))
# peft/tuners/lora.py of v0.4.0: every field that it saved.
PEFT_04: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": "base",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": 6,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "revision": None,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}
# v0.2.0 knew neither auto_mapping, init_lora_weights nor the layers, but these.
PEFT_02 = {
    key: value
    for key, value in PEFT_04.items()
    if key not in ("auto_mapping", "init_lora_weights", "layers_pattern", "layers_to_transform")
} | {"enable_lora": None, "merge_weights": False}
PEFT_09 = PEFT_04 | {
    "alpha_pattern": {},
    "loftq_config": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "rank_pattern": {},
    "use_dora": True,
    "use_rslora": False,
}


class Row(NamedTuple):
    """An adapter of an old release.

    Attributes:
        config: its ``adapter_config.json``.
        adapted: module paths with factors.
        replaced: parameter paths whose values it replaces, saved under their plain keys.
        magnitude: DoRA's key below the module; empty without DoRA.
    """

    config: dict[str, Any]
    adapted: tuple[str, ...]
    replaced: tuple[str, ...] = ()
    magnitude: str = ""


def _attention(*layers: int) -> tuple[str, ...]:
    return tuple(f"model.layers.{x}.self_attn.{part}_proj" for x in layers for part in "qv")


ROWS: dict[str, Row] = {
    "v0.2": Row(PEFT_02, _attention(0, 1)),
    "v0.2-merge": Row(PEFT_02 | {"merge_weights": True}, _attention(0, 1)),
    "v0.4": Row(PEFT_04, _attention(0, 1)),
    "v0.4-layers": Row(
        PEFT_04 | {"layers_to_transform": [1], "layers_pattern": "layers"}, _attention(1)
    ),
    # With the keys that the refusal of plain ones asks for (tests/test_refusals.py).
    "v0.4-bias": Row(
        PEFT_04 | {"bias": "lora_only"},
        _attention(0, 1),
        tuple(f"{path}.bias" for path in _attention(0, 1)),
    ),
    "v0.4-saved": Row(
        PEFT_04 | {"modules_to_save": ["model.norm"]}, _attention(0, 1), ("model.norm.weight",)
    ),
    # A ParameterDict in v0.9, a ModuleDict from v0.11 on; both keys were seen.
    "v0.9-dora": Row(PEFT_09, _attention(0, 1), magnitude="lora_magnitude_vector"),
    "v0.11-dora": Row(PEFT_09, _attention(0, 1), magnitude="lora_magnitude_vector.weight"),
    "v0.4-conv1d": Row(
        PEFT_04 | {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj"]},
        tuple(
            f"transformer.h.{x}.{part}"
            for x in (0, 1)
            for part in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
        ),
    ),
}


class Written(NamedTuple):
    """An adapter's folder, and the logits of a model that was changed by hand."""

    directory: Path
    logits: NDArray[np.float32]


def _write(base: Path, row: Row, directory: Path, seed: int) -> Written:
    model = AutoModelForCausalLM.from_pretrained(base)
    random = np.random.default_rng(seed)

    def values(*shape: int) -> NDArray[np.float32]:
        return (random.standard_normal(shape) * 0.3).astype(np.float32)

    tensors: dict[str, NDArray[np.float32]] = {}
    scale = row.config["lora_alpha"] / row.config["r"]
    with torch.no_grad():
        for path in row.adapted:
            weight = model.get_parameter(f"{path}.weight")
            transposed = row.config["fan_in_fan_out"]
            matrix = (weight.T if transposed else weight).double()
            a, b = values(4, matrix.shape[1]), values(matrix.shape[0], 4)
            adapted = matrix + scale * torch.tensor(b).double() @ torch.tensor(a).double()
            key = f"base_model.model.{path}"
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
            if row.magnitude:
                m = np.abs(values(matrix.shape[0])) + np.float32(0.5)
                tensors[f"{key}.{row.magnitude}"] = m
                norm = torch.linalg.norm(adapted, dim=1, keepdim=True)
                adapted = torch.tensor(m)[:, None] * adapted / norm
            weight.copy_(adapted.T if transposed else adapted)
        for path in row.replaced:
            parameter = model.get_parameter(path)
            new = values(*parameter.shape)
            module, _, own = path.rpartition(".")
            inner = f"{module}.base_layer" if module in row.adapted else module
            tensors[f"base_model.model.{inner}.{own}"] = new
            parameter.copy_(torch.tensor(new))
        logits: NDArray[np.float32] = model.eval()(torch.tensor(IDS)).logits.numpy()
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(row.config))
    save_file(tensors, directory / "adapter_model.safetensors")
    return Written(directory, logits)


class Exported(NamedTuple):
    """A base, its adapters and the runner of all of them."""

    base: Path
    written: dict[str, Written]
    runner: lora_edge.Runner


@pytest.fixture(scope="module")
def exported_by_family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    found = {}
    for family in ("qwen2", "gpt2"):
        root = tmp_path_factory.mktemp(family)
        base = make_base(family, root / "base")
        names = [name for name in ROWS if ("conv1d" in name) is (family == "gpt2")]
        written = {
            name: _write(base, ROWS[name], root / name, seed) for seed, name in enumerate(names)
        }
        adapters = {name: item.directory for name, item in written.items()}
        lora_edge.export(base, adapters, output=root / "out")
        found[family] = Exported(base, written, lora_edge.Runner(root / "out"))
    return found


@pytest.mark.parametrize("name", examples(ROWS, ["v0.4-bias", "v0.9-dora", "v0.4-saved"]))
def test_exact_in_both_modes(
    name: str, exported_by_family: dict[str, Exported], tmp_path: Path
) -> None:
    found = exported_by_family["gpt2" if "conv1d" in name else "qwen2"]
    expected = found.written[name].logits
    got = found.runner.logits(IDS, adapter=name)
    np.testing.assert_allclose(got, expected, atol=3e-5)
    assert np.abs(expected - found.runner.logits(IDS)).max() > 0.1
    others = [found.runner.logits(IDS, adapter=other) for other in found.written if other != name]
    assert all(np.abs(expected - other).max() > 0.01 for other in others)
    lora_edge.export(found.base, {name: found.written[name].directory}, "merged", tmp_path / "out")
    merged = lora_edge.Runner(tmp_path / "out").logits(IDS)
    np.testing.assert_allclose(merged, expected, atol=3e-5)
