"""Adapters of MLX-LM: the same pairs as PEFT's, by the formulas of ``mlx_lm/tuner``; or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_edge.adapter.load import load_adapter
from lora_edge.adapter.mlx import MLX_FILE, is_mlx
from lora_edge.adapter.source import peft_directory
from lora_edge.errors import AdapterError
from tests.support.paths import ROOT

PATH = "model.layers.0.self_attn.q_proj"
CONFIG: dict[str, Any] = {
    "fine_tune_type": "lora",
    "num_layers": 1,
    "lora_parameters": {"rank": 3, "scale": 20.0, "dropout": 0.0},
    "model": "mlx-community/tiny",
}


def _values(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def _folder(directory: Path, config: dict[str, Any], **tensors: np.ndarray) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"{PATH}.{part}": x for part, x in tensors.items()}, directory / MLX_FILE)
    return directory


def test_the_change_of_a_layer_is_mlxs(tmp_path: Path) -> None:
    a, b, x = _values(6, 3), _values(3, 4) * 2, _values(2, 6)
    folder = _folder(tmp_path / "a", CONFIG, lora_a=a, lora_b=b)
    assert is_mlx(folder)
    with peft_directory(folder) as directory:
        adapter = load_adapter(directory, "x")
        assert load_file(directory / "adapter_model.safetensors")  # the package reads it too
    assert not directory.exists()
    change = adapter.modules[PATH].delta()
    # LoRALinear.__call__: y + scale * ((x @ lora_a) @ lora_b)
    np.testing.assert_allclose(x @ change.T, 20.0 * ((x @ a) @ b), rtol=1e-5)
    assert adapter.base_model == "mlx-community/tiny"


def test_the_magnitude_is_mlxs(tmp_path: Path) -> None:
    a, b, m, w = _values(6, 3), _values(3, 4), np.abs(_values(4)), _values(4, 6)
    config = CONFIG | {"fine_tune_type": "dora"}
    with peft_directory(_folder(tmp_path / "a", config, lora_a=a, lora_b=b, m=m)) as directory:
        module = load_adapter(directory, "x").modules[PATH]
    # DoRALinear.__call__: (m / ||W + scale * B.T A.T||) * y
    adapted = w + 20.0 * b.T @ a.T
    gain = module.gain(w.astype(np.float64))
    np.testing.assert_allclose(gain, m / np.linalg.norm(adapted, axis=1), rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "parts", "words"),
    [
        ({"fine_tune_type": "full"}, {}, "MLX-LM, and fine_tune_type is 'full'"),
        ({"lora_parameters": {"rank": 3, "alpha": 8, "scale": 2.0}}, {}, "scale .* not follow"),
        ({"lora_parameters": {"rank": 3}}, {}, "scale .* not follow"),
        ({}, {"lora_a": _values(2, 3, 6)}, "stack of experts"),
        ({}, {"lora_a": _values(6, 2)}, "ranks differ"),
        ({}, {"weight": _values(4, 6)}, "no factor of a LoRA"),
        ({"fine_tune_type": "dora"}, {}, "expected lora_a, lora_b, m"),
    ],
)
def test_what_is_not_converted_is_named(
    config: dict[str, Any], parts: dict[str, np.ndarray], words: str, tmp_path: Path
) -> None:
    tensors = {"lora_a": _values(6, 3), "lora_b": _values(3, 4)} | parts
    folder = _folder(tmp_path / "a", CONFIG | config, **tensors)
    with pytest.raises(AdapterError, match=words) as caught, peft_directory(folder):
        pass
    assert "MLX" in str(caught.value) or "lora_a" in str(caught.value)
    assert caught.value.hint


def test_a_hub_id_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ROOT / "models" / "adapters" / "shout"
    repo = tmp_path / "models--org--shout"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (snapshot / name).write_bytes((source / name).read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with peft_directory("org/shout") as directory:
        assert load_adapter(directory, "x").modules.keys() == load_adapter(source).modules.keys()
    other = peft_directory("org/other")
    with (
        pytest.raises(AdapterError, match="adapter 'org/other' is no folder, and no hub id"),
        other,
    ):
        pass
