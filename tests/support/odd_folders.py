"""Adapter folders that are odd in one way each: what PEFT's own loader does, and what we must do.

``python tests/export/odd_folders.py`` prints the table of ``docs/peft-loading.md``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
Config = dict[str, Any]
Tensors = dict[str, Any]
NO_EFFECT = "`lora_alpha` is 0"
EXACT = ""
"""What is exported does what PEFT's model does."""


class Row(NamedTuple):
    """An adapter folder.

    Attributes:
        kind: the adapter that PEFT saved, by its name in :data:`KINDS`.
        peft: what PEFT 0.21 makes of the folder, as :func:`tests.export.test_odd_folders.told`
            says it.
        ours: words of our refusal, or :data:`EXACT`.
        config: changes the saved config.
        tensors: changes the saved tensors.
        files: changes the folder, at last.
        why: why we refuse what PEFT loads; empty where we do as PEFT does.
    """

    kind: str
    peft: str
    ours: str = EXACT
    config: Callable[[Config], Any] | None = None
    tensors: Callable[[Tensors], Tensors] | None = None
    files: Callable[[Path], None] | None = None
    why: str = ""


_QV = ["q_proj", "v_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": _QV},
    "dora": {"target_modules": _QV, "use_dora": True},
    "lora_bias": {"target_modules": _QV, "lora_bias": True},
    "layer 1": {"target_modules": _QV, "layers_to_transform": [1]},
    "regex": {"target_modules": r".*\.1\..*(up|gate)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "norm saved": {"target_modules": _QV, "modules_to_save": ["model.norm"]},
    "tied, saved": {
        "target_modules": _QV,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "tied, head saved": {
        "target_modules": _QV,
        "modules_to_save": ["lm_head"],
        "ensure_weight_tying": True,
    },
    "tied, adapted": {
        "target_modules": ["q_proj", "embed_tokens"],
        "ensure_weight_tying": True,
    },
    "tokens": {"target_modules": _QV, "trainable_token_indices": [3, 5]},
    "parameter": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
}


def _keys(turn: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {turn(key): x for key, x in tensors.items()}


def _set(**fields: Any) -> Callable[[Config], Any]:
    return lambda config: config | fields


def _fails(error: str, refusal: str, **fields: Any) -> Row:
    """Fields of the configuration with which PEFT raises an error."""
    return _given(f"{_FAILS}{error}", refusal, **fields)


def _given(peft: str, refusal: str, why: str = "", **fields: Any) -> Row:
    return Row("plain", peft, refusal, config=_set(**fields), why=why)


def _without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: x for key, x in tensors.items() if part not in key}


def _with(key: str, *shape: int) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        return tensors | {f"{PREFIX}{key}": values * 0.2}

    return change


def _cast(dtype: torch.dtype) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        from safetensors.torch import load_file as load
        from safetensors.torch import save_file as save

        save({k: x.to(dtype) for k, x in load(folder / WEIGHTS).items()}, folder / WEIGHTS)

    return change


def _pickled(folder: Path) -> None:
    tensors = {k: torch.tensor(x) for k, x in load_file(folder / WEIGHTS).items()}
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def _nested(folder: Path) -> None:
    inner = folder / "best"
    inner.mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.move(folder / name, inner / name)


def _pointer(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        oid = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 33\n"
        (folder / name).write_text(text)

    return change


def _twice(tensors: Tensors) -> Tensors:
    return tensors | {k.replace(".weight", ".default.weight"): x for k, x in tensors.items()}


def _nan(tensors: Tensors) -> Tensors:
    key = next(iter(tensors))
    changed = tensors[key].copy()
    changed[0, 0] = np.nan
    return tensors | {key: changed}


def _below(segment: str) -> Callable[[str], str]:
    return lambda key: key.replace(PREFIX, f"{PREFIX}{segment}.")


def _before(segment: str) -> Callable[[str], str]:
    return lambda key: f"{segment}.{key}"


_DROPS_ALL = "drops 8 of 8 tensors, lacks 8"
_LOADS = "loads all"
_FAILS = "fails: "


def _wrapped(segment: str, whose: str, where: Callable[[str], Callable[[str], str]]) -> Row:
    """The keys of a model inside a wrapper."""
    refusal = f"'{segment}', of {whose}: strip"
    return Row("plain", _DROPS_ALL, refusal, tensors=_keys(where(segment)))


ROWS: dict[str, Row] = {
    "as PEFT saves it": Row("plain", _LOADS),
    "bfloat16 tensors": Row("plain", _LOADS, files=_cast(torch.bfloat16)),
    "float16 tensors": Row("plain", _LOADS, files=_cast(torch.float16)),
    "`.default.` in the keys": Row(
        "plain", _LOADS, tensors=_keys(lambda k: k.replace(".weight", ".default.weight"))
    ),
    "`.default.` in the keys of DoRA": Row(
        "dora",
        _LOADS,
        tensors=_keys(
            lambda k: k.replace(".weight", ".default.weight").replace(
                "_vector", "_vector.default.weight"
            )
        ),
    ),
    "each key with and without `.default.`": Row("plain", _LOADS, tensors=_twice),
    "another adapter's name in the keys": Row(
        "plain",
        _DROPS_ALL,
        "drops 8 of its 8 tensors.*'mine', the name of the adapter: strip",
        tensors=_keys(lambda k: k.replace(".weight", ".mine.weight")),
    ),
    "keys without `base_model.model.`": Row(
        "plain",
        _DROPS_ALL,
        r"drops 8 of its 8 tensors.*does not begin with base_model\.model\.",
        tensors=_keys(lambda k: k.removeprefix(PREFIX)),
    ),
    "`base_model.model.` twice": Row(
        "plain", _DROPS_ALL, r"base_model\.model\. twice", tensors=_keys(lambda k: PREFIX + k)
    ),
    "one key without `base_model.model.`": Row(
        "plain",
        "drops 1 of 8 tensors, lacks 1",
        "drops 1 of its 8 tensors",
        tensors=_keys(lambda k: k.removeprefix(PREFIX) if "0.self_attn.q_proj.lora_A" in k else k),
    ),
    "keys of the bare decoder (no `model.`)": Row(
        "plain",
        _DROPS_ALL,
        "has no such site; near misses",
        tensors=_keys(lambda k: k.replace(f"{PREFIX}model.", PREFIX)),
    ),
    "`_orig_mod.` in the keys": _wrapped("_orig_mod", "torch.compile", _below),
    "`_orig_mod.` before all keys": _wrapped("_orig_mod", "torch.compile", _before),
    "`_checkpoint_wrapped_module.` in the keys": Row(
        "plain",
        _DROPS_ALL,
        "'_checkpoint_wrapped_module', of activation checkpointing: strip",
        tensors=_keys(lambda k: k.replace(".self_attn", "._checkpoint_wrapped_module.self_attn")),
    ),
    "`_fsdp_wrapped_module.` in the keys": _wrapped("_fsdp_wrapped_module", "FSDP", _below),
    "`module.` before all keys": _wrapped("module", "DistributedDataParallel", _before),
    "`module.` below the prefix": _wrapped("module", "DistributedDataParallel", _below),
    "`target_modules` without one that has tensors": _given(
        "drops 4 of 8 tensors",
        r"drops 4 of its 8 tensors.*v_proj.*target_modules is \['q_proj'\]",
        target_modules=["q_proj"],
    ),
    "`target_modules` with one more": _given(
        "lacks 4", "lacks 4 tensors", target_modules=["q_proj", "v_proj", "k_proj"]
    ),
    "`target_modules` of other layers": _given(
        "drops 8 of 8 tensors, lacks 4", "drops 8 of its 8", target_modules=["o_proj"]
    ),
    "`target_modules` that are not in the base": _fails(
        "NoMatchingPeftModuleError", "drops 8 of its 8", target_modules=["query"]
    ),
    "`target_modules` names a norm": _fails(
        "ValueError", "no low-rank pair", target_modules=["q_proj", "v_proj", "input_layernorm"]
    ),
    "`target_modules` names a block": _fails(
        "ValueError", "no low-rank pair", target_modules=["q_proj", "v_proj", "mlp"]
    ),
    "`target_modules` is null": _given(
        _LOADS,
        "target_modules is not set",
        target_modules=None,
        why="PEFT chooses by a table of its release",
    ),
    "`target_modules` is a pattern": Row("regex", _LOADS),
    "a pattern that is the name alone": _fails(
        "NoMatchingPeftModuleError", "drops 8 of its 8 tensors", target_modules="q_proj|v_proj"
    ),
    "a pattern of one layer": _given(
        "drops 4 of 8 tensors",
        "drops 4 of its 8 tensors",
        target_modules=r"model\.layers\.0\..*\.(q|v)_proj",
    ),
    "a pattern that is no regular expression": _fails(
        "PatternError", "not a regular expression", target_modules="(q_proj"
    ),
    "`all-linear` in words": Row("all-linear", _LOADS, config=_set(target_modules="all-linear")),
    "`all-linear`, tensors of some": Row(
        "plain", "lacks 20", "lacks 20 tensors", config=_set(target_modules="ALL-linear")
    ),
    "`all-linear`, tensors of the output layer": Row(
        "head",
        "drops 3 of 7 tensors, lacks 24",
        "drops 3 of its 7 tensors",
        config=_set(target_modules="all-linear"),
    ),
    "`layers_to_transform`": Row("layer 1", _LOADS),
    "`layers_to_transform` of fewer layers": _given(
        "drops 4 of 8 tensors", r"drops 4.*layers_to_transform is \[1\]", layers_to_transform=[1]
    ),
    "`layers_to_transform` is a number": _given(
        "drops 4 of 8 tensors", "drops 4.*layers_to_transform is 0", layers_to_transform=0
    ),
    "`layers_to_transform` beside full paths": Row(
        "plain",
        "drops 2 of 8 tensors",
        "drops 2",
        config=_set(
            layers_to_transform=[1], target_modules=["model.layers.0.self_attn.q_proj", *_QV]
        ),
    ),
    "`layers_pattern` of the model": Row("layer 1", _LOADS, config=_set(layers_pattern=["layers"])),
    "`layers_pattern` of another model": Row(
        "layer 1",
        f"{_FAILS}NoMatchingPeftModuleError",
        "drops 4 of its 4",
        config=_set(layers_pattern="h"),
    ),
    "`layers_pattern` alone": _fails(
        "ValueError", "layers_pattern is set without", layers_pattern="layers"
    ),
    "`layers_to_transform` beside a pattern": Row(
        "regex",
        f"{_FAILS}ValueError",
        "target_modules is a pattern",
        config=_set(layers_to_transform=[1]),
    ),
    "`exclude_modules` excludes a layer with tensors": _given(
        "drops 2 of 8 tensors",
        "drops 2 of its 8.*exclude_modules",
        exclude_modules=["layers.0.self_attn.q_proj"],
    ),
    "`exclude_modules` is a pattern": _given(
        "drops 4 of 8 tensors", "drops 4 of its 8.*exclude_modules", exclude_modules=r".*\.0\..*"
    ),
    "`exclude_modules` hits nothing": Row("plain", _LOADS, config=_set(exclude_modules=["wte"])),
    "a rank pattern that hits nothing": Row(
        "plain", _LOADS, config=_set(rank_pattern={"k_proj": 5})
    ),
    "an alpha pattern that hits nothing": Row(
        "plain", _LOADS, config=_set(alpha_pattern={"k_proj": 9, "^q_proj": 3})
    ),
    "two alpha patterns, the first decides": Row(
        "plain", _LOADS, config=_set(alpha_pattern={r"layers\.0\..*": 9, "q_proj": 2})
    ),
    "a rank pattern that contradicts": _fails(
        "RuntimeError", "has rank 3, but the config says 5", rank_pattern={"q_proj": 5}
    ),
    "`r` of another adapter": Row(
        "plain",
        f"{_FAILS}RuntimeError",
        "has rank 3, but the config says 8",
        config=lambda config: {k: v for k, v in config.items() if k != "r"},
    ),
    "one `lora_B` is missing": Row(
        "plain", "lacks 1", "has no lora_B", tensors=_without("0.self_attn.v_proj.lora_B")
    ),
    "one module is missing": Row(
        "plain", "lacks 2", "lacks 2 tensors", tensors=_without("0.self_attn.v_proj")
    ),
    "a tensor of an unknown kind": Row(
        "plain",
        "drops 1 of 9 tensors",
        "of a kind that this release does not know",
        tensors=_with("model.layers.0.self_attn.q_proj.lora_diag", 3),
    ),
    "magnitudes, `use_dora` is false": Row(
        "dora",
        "drops 4 of 12 tensors",
        "drops 4 of its 12.*use_dora is False",
        config=_set(use_dora=False),
    ),
    "`use_dora` is true, no magnitudes": Row(
        "plain", "lacks 4", "lacks a lora_magnitude_vector", config=_set(use_dora=True)
    ),
    "biases of B, `lora_bias` is false": Row(
        "lora_bias",
        "drops 4 of 12 tensors",
        "drops 4 of its 12.*lora_bias is False",
        config=_set(lora_bias=False),
    ),
    "`modules_to_save` names what the file lacks": _fails(
        "KeyError", "wants the tensor.*norm.weight", modules_to_save=["model.norm"]
    ),
    "`modules_to_save` and its tensor": Row("norm saved", _LOADS),
    "`modules_to_save` names nothing": Row("plain", _LOADS, config=_set(modules_to_save=["wpe"])),
    "`modules_to_save` over adapted layers": _fails(
        "NoMatchingPeftModuleError",
        "drops 8 of its 8.*saves it whole",
        modules_to_save=["self_attn"],
    ),
    "a saved tensor that no field names": Row(
        "norm saved",
        _LOADS,
        "differs from the base's",
        config=_set(modules_to_save=None),
        why="PEFT writes it over the base, for every adapter",
    ),
    "the base's embedding, saved along": Row("embedding", _LOADS),
    "a tied embedding saved with `ensure_weight_tying`": Row("tied, saved", _LOADS),
    "a tied output layer saved with `ensure_weight_tying`": Row("tied, head saved", _LOADS),
    "a tied embedding adapted with `ensure_weight_tying`": Row("tied, adapted", _LOADS),
    "`ensure_weight_tying`, no tensor of the output layer": Row(
        "tied, saved",
        f"{_FAILS}KeyError",
        "wants the tensor.*lm_head.weight",
        tensors=_without("lm_head"),
    ),
    "`ensure_weight_tying`, two different tensors": Row(
        "tied, saved",
        _LOADS,
        "holds other values for lm_head",
        tensors=lambda tensors: (
            tensors | {f"{PREFIX}lm_head.weight": tensors[f"{PREFIX}lm_head.weight"] + 1}
        ),
        why="PEFT gives both layers the one that it reads last",
    ),
    "trained token rows": Row("tokens", _LOADS),
    "`trainable_token_indices` without rows": _fails(
        "KeyError", "no tensor holds trained rows", trainable_token_indices=[3]
    ),
    "token rows without `trainable_token_indices`": Row(
        "tokens",
        "drops 1 of 9 tensors",
        "trainable_token_indices is None",
        config=_set(trainable_token_indices=None),
    ),
    "`target_parameters` of a linear layer": Row("parameter", _LOADS),
    "empty tensors (ZeRO-3, not gathered)": Row(
        "plain",
        f"{_FAILS}RuntimeError",
        "8 of 8 tensors are empty.*ZeRO-3",
        tensors=lambda tensors: {k: np.zeros(0, np.float32) for k in tensors},
    ),
    "a Git LFS pointer for the tensors": Row(
        "plain", f"{_FAILS}SafetensorError", "Git LFS", files=_pointer(WEIGHTS)
    ),
    "a Git LFS pointer for the config": Row(
        "plain", f"{_FAILS}JSONDecodeError", "Git LFS", files=_pointer(CONFIG)
    ),
    "the adapter in a folder below": Row(
        "plain", f"{_FAILS}ValueError", "several saved adapters", files=_nested
    ),
    "a pickle": Row(
        "plain",
        _LOADS,
        "is a pickle",
        files=_pickled,
        why="a pickle can run code",
    ),
    "NaN in a tensor": Row("plain", _LOADS, "NaN or Inf", tensors=_nan, why="its logits are NaN"),
    "`lora_alpha` beyond float32": Row(
        "plain", _LOADS, "float32", config=_set(lora_alpha=1e39), why="its logits are NaN"
    ),
    "`lora_alpha` is 0": Row("plain", _LOADS, config=_set(lora_alpha=0)),
    "a field that PEFT does not know": _given(
        _LOADS, "this release does not know it", brand_new=3, why="what it means is not known"
    ),
    "no `peft_type`": Row(
        "plain",
        f"{_FAILS}KeyError",
        "peft_type is None",
        config=lambda config: {k: v for k, v in config.items() if k != "peft_type"},
    ),
}


def write(row: Row, saved: Mapping[str, Path], folder: Path) -> Path:
    """The folder of a row, from the adapter that PEFT saved."""
    shutil.copytree(saved[row.kind], folder)
    if row.config is not None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(row.config(config)))
    if row.tensors is not None:
        save_file(row.tensors(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    if row.files is not None:
        row.files(folder)
    return folder


def table() -> list[str]:
    """The lines of the table in the documentation."""
    lines = ["| folder | PEFT 0.21 | lora-edge |", "|---|---|---|"]
    for name, row in ROWS.items():
        ours = "the same logits" if row.ours == EXACT else "refused"
        if row.why:
            ours += f": {row.why}"
        lines.append(f"| {name} | {row.peft} | {ours} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
