"""A base model on disk or in the hub's cache: found, refused, and identified by its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from lora_edge.base.checkpoint import resolve_base
from lora_edge.errors import BaseModelError, LoraEdgeError

RANDOM = np.random.default_rng(0)
TENSORS = {
    "model.embed_tokens.weight": RANDOM.normal(size=(11, 4)).astype(np.float32),
    "model.layers.0.mlp.up_proj.weight": RANDOM.normal(size=(6, 4)).astype(np.float32),
    "model.norm.weight": RANDOM.normal(size=4).astype(np.float16),
}


def _make(directory: Path, shards: list[dict[str, np.ndarray]] | None = None) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for index, tensors in enumerate([TENSORS] if shards is None else shards):
        save_file(tensors, directory / f"model-{index}.safetensors")
    return directory


def test_weights_are_read_by_key_and_by_module_path(tmp_path: Path) -> None:
    base = resolve_base(_make(tmp_path / "base"))
    assert base.model_type == "llama"
    assert base.keys() == tuple(sorted(TENSORS))
    for key, tensor in TENSORS.items():
        np.testing.assert_array_equal(base.weight(key), tensor.astype(np.float32))
    up = TENSORS["model.layers.0.mlp.up_proj.weight"]
    for path in ("model.layers.0.mlp.up_proj", "wrapper.model.layers.0.mlp.up_proj"):
        found = base.parameter(f"{path}.weight")
        assert found is not None
        np.testing.assert_array_equal(found, up)
    assert base.parameter("lm_head.weight") is None
    with pytest.raises(BaseModelError, match=r"lm_head\.weight"):
        base.weight("lm_head.weight")


def test_bfloat16_weights_are_widened(tmp_path: Path) -> None:
    directory = _make(tmp_path / "base", [])
    tensor = torch.randn(3, 5).bfloat16()
    save_torch({"x": tensor}, directory / "model.safetensors")
    np.testing.assert_array_equal(resolve_base(directory).weight("x"), tensor.float().numpy())


def test_a_quantized_weight_is_refused(tmp_path: Path) -> None:
    directory = _make(tmp_path / "base", [{"x": np.zeros((2, 3), np.int8)}])
    with pytest.raises(BaseModelError, match="I8") as caught:
        resolve_base(directory).weight("x")
    assert "full-precision" in caught.value.hint


def test_the_fingerprint_does_not_depend_on_the_files(tmp_path: Path) -> None:
    whole = _make(tmp_path / "whole")
    keys = list(TENSORS)
    parts = [{key: TENSORS[key]} for key in reversed(keys)]
    sharded = _make(tmp_path / "sharded", parts)
    other_order = _make(tmp_path / "order", [{key: TENSORS[key] for key in reversed(keys)}])
    save_file(TENSORS, other_order / "model-0.safetensors", metadata={"format": "pt"})
    (sharded / "config.json").write_text('{"model_type": "other"}')
    found = {resolve_base(path).fingerprint() for path in (whole, sharded, other_order)}
    assert len(found) == 1


def test_the_fingerprint_depends_on_every_byte_name_shape_and_dtype(tmp_path: Path) -> None:
    key = "model.layers.0.mlp.up_proj.weight"
    nudged = TENSORS[key].copy()
    nudged.view(np.uint8).reshape(-1)[-1] ^= 1
    rest = {other: tensor for other, tensor in TENSORS.items() if other != key}
    variants = {
        "same": TENSORS,
        "byte": TENSORS | {key: nudged},
        "name": rest | {"model.layers.1.mlp.up_proj.weight": TENSORS[key]},
        "shape": TENSORS | {key: TENSORS[key].reshape(4, 6)},
        "dtype": TENSORS | {key: TENSORS[key].view(np.int32)},
        "fewer": rest,
    }
    found = {
        name: resolve_base(_make(tmp_path / name, [tensors])).fingerprint()
        for name, tensors in variants.items()
    }
    assert len(set(found.values())) == len(variants)


def test_the_fingerprint_follows_a_file_that_was_changed(tmp_path: Path) -> None:
    """The figures are cached; a cache entry must not outlive the content."""
    directory = _make(tmp_path / "base")
    before = resolve_base(directory).fingerprint()
    changed = {key: tensor * 2 for key, tensor in TENSORS.items()}
    save_file(changed, directory / "model-0.safetensors")
    base = resolve_base(directory)
    assert base.fingerprint() != before
    key = "model.norm.weight"
    np.testing.assert_array_equal(base.weight(key), changed[key].astype(np.float32))


# --- hub ids -------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, offline."""
    from huggingface_hub import constants

    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def test_a_hub_id_that_is_not_cached_is_one_clear_error(cache: Path) -> None:
    with pytest.raises(BaseModelError, match=r"'some-org/some-model'.*no hub id that") as caught:
        resolve_base("some-org/some-model")
    assert "\n" not in str(caught.value)
    assert "download" in caught.value.hint
    assert not list(cache.rglob("*.safetensors"))


def test_a_hub_id_in_the_cache_is_found(cache: Path) -> None:
    """The cache's layout: blobs, and snapshots of links to them."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = cache / "models--some-org--some-model"
    made = _make(cache.parent / "made")
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for file in made.iterdir():
        blob = repo / "blobs" / f"blob-{file.name}"
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(blob)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    base = resolve_base("some-org/some-model")
    assert base.name_or_path == "some-org/some-model"
    assert base.directory == snapshot
    assert base.fingerprint() == resolve_base(made).fingerprint()


def test_a_local_folder_comes_before_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make(tmp_path / "some-org" / "some-model")
    monkeypatch.chdir(tmp_path)
    assert resolve_base("some-org/some-model").directory == Path("some-org/some-model")


@pytest.mark.parametrize("name", ["bad org/na me", "org/..", "-org/name"])
def test_what_cannot_be_a_hub_id_is_one_error_too(name: str, cache: Path) -> None:  # noqa: ARG001
    with pytest.raises(LoraEdgeError) as caught:
        resolve_base(name)
    assert caught.value.hint


# --- folders that are no base --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./no/such", "/no/such", "a/b/c", "no-such", "~/no"])
def test_a_missing_folder(name: str) -> None:
    with pytest.raises(BaseModelError, match="is not a folder") as caught:
        resolve_base(name)
    assert name in str(caught.value)


def test_a_file_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BaseModelError, match="is not a folder"):
        resolve_base(tmp_path / "file")


def test_folders_that_lack_something(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BaseModelError, match=r"no config\.json"):
        resolve_base(tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseModelError, match="is an adapter") as caught:
        resolve_base(tmp_path / "empty")
    assert "-a NAME=DIR" in caught.value.hint
    bare = _make(tmp_path / "bare", [])
    with pytest.raises(BaseModelError, match="no safetensors"):
        resolve_base(bare)
    (bare / "config.json").write_text("{cut")
    with pytest.raises(BaseModelError, match=r"config\.json is not JSON"):
        resolve_base(bare)


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    directory = _make(tmp_path / "base")
    file = directory / "model-0.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(BaseModelError, match=r"model-0\.safetensors is not a whole .* is cut off"):
        resolve_base(directory).fingerprint()


def test_an_index_decides_which_files_are_the_bases(tmp_path: Path) -> None:
    """``consolidated.safetensors`` lies beside many published models."""
    clean = resolve_base(_make(tmp_path / "clean"))
    base = _make(tmp_path / "base")
    weights = {"metadata": {}, "weight_map": dict.fromkeys(TENSORS, "model-0.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(weights))
    save_file({"other.weight": np.ones((2, 3), np.float32)}, base / "consolidated.safetensors")
    found = resolve_base(base)
    assert found.keys() == clean.keys()
    assert found.fingerprint() == clean.fingerprint()


def test_a_single_file_decides_too(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file(TENSORS, base / "model.safetensors")
    before = resolve_base(base).fingerprint()
    save_file({"model.norm.weight": np.ones(4, np.float32)}, base / "consolidated.safetensors")
    assert resolve_base(base).fingerprint() == before
    norm = TENSORS["model.norm.weight"].astype(np.float32)
    np.testing.assert_array_equal(resolve_base(base).weight("model.norm.weight"), norm)


@pytest.mark.parametrize(
    "weight_map", [["x"], {"x": 1}, {"x": "model-7.safetensors"}, {"x": "../model-0.safetensors"}]
)
def test_a_damaged_index_is_refused(weight_map: object, tmp_path: Path) -> None:
    base = _make(tmp_path / "base")
    index = {"weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseModelError, match="index") as caught:
        resolve_base(base)
    assert caught.value.hint
