"""Each odd folder of ``odd_folders.py``: what PEFT makes of it, and ``add`` and ``inspect``."""

from __future__ import annotations

import functools
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import lora_edge
from lora_edge.adapter.directory import read_config, tensor_keys
from lora_edge.adapter.loading import BaseView, loading
from lora_edge.base.checkpoint import resolve_base
from lora_edge.bundle.bundle import load_bundle
from lora_edge.errors import AdapterError, LoraEdgeError
from lora_edge.fit.inspect import inspect_adapter
from lora_edge.names import parse_peft_key
from lora_edge.parity.peft_models import attached
from tests.support.families import make_base
from tests.support.kinds import Row as Kind
from tests.support.kinds import make_kind
from tests.support.odd_folders import (
    CONFIG,
    EXACT,
    KINDS,
    NO_EFFECT,
    PREFIX,
    ROWS,
    WEIGHTS,
    table,
    write,
)
from tests.support.paths import ROOT

IDS = np.random.default_rng(6).integers(0, 256, (2, 10))
DOC = ROOT / "docs" / "peft-loading.md"


class Peft(NamedTuple):
    """What PEFT makes of a folder."""

    told: str
    logits: NDArray[np.float32] | None
    missing: frozenset[str] = frozenset()
    unexpected: frozenset[str] = frozenset()


class World(NamedTuple):
    base: Path
    bundle: Path
    folders: dict[str, Path]
    errors: dict[str, LoraEdgeError]
    runner: lora_edge.Runner


@functools.cache
def _load(base: Path, folder: Path) -> Peft:
    """PEFT's own loader, under the name that it gives an adapter by itself."""
    model = AutoModelForCausalLM.from_pretrained(base)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(model, folder)
            result = adapted.load_adapter(folder, adapter_name="default")
    except Exception as error:  # noqa: BLE001 - whatever it raises is the answer
        return Peft(f"fails: {type(error).__name__.replace('error', 'PatternError')}", None)
    with torch.inference_mode():
        logits = adapted.eval()(torch.tensor(IDS)).logits.numpy()
    missing = {key.replace(".default", "") for key in result.missing_keys}
    told = []
    if result.unexpected_keys:
        count = len(json.loads(_header(folder / WEIGHTS)))
        told.append(f"drops {len(result.unexpected_keys)} of {count} tensors")
    if missing:
        told.append(f"lacks {len(missing)}")
    return Peft(
        ", ".join(told) or "loads all",
        logits,
        frozenset(key.replace("_vector.weight", "_vector") for key in missing),
        frozenset(result.unexpected_keys),
    )


def _header(file: Path) -> str:
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header.pop("__metadata__", None)
    return json.dumps(header)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("odd")
    base = make_base("llama", root / "base", tie_word_embeddings=True)
    saved = {
        kind: make_kind(base, Kind("llama", settings), root / "saved" / kind, seed)
        for seed, (kind, settings) in enumerate(KINDS.items())
    }
    # With an adapter on the output layer, so that this has branches too.
    bundle = lora_edge.export(
        base,
        {"head": saved["head"]},
        output=root / "out",
        kinds=["lora", "dora", "bias", "norm", "embedding"],
    )
    folders, errors = {}, {}
    for index, (name, row) in enumerate(ROWS.items()):
        folders[name] = write(row, saved, root / f"row{index}")
        try:
            lora_edge.add(root / "out", {f"row{index}": folders[name]}, base)
        except LoraEdgeError as error:
            errors[name] = error
    return World(base, bundle.directory, folders, errors, lora_edge.Runner(root / "out"))


@pytest.mark.parametrize("name", ROWS)
def test_as_peft_loads_it_or_refused(name: str, world: World) -> None:
    row, folder = ROWS[name], world.folders[name]
    peft, error = _load(world.base, folder), world.errors.get(name)
    assert peft.told == row.peft
    # A refusal is right where PEFT does not load what is there; elsewhere it needs a reason.
    assert bool(row.why) is (row.ours != EXACT and peft.told == "loads all")
    if row.ours != EXACT:
        assert error is not None
        assert re.search(row.ours, str(error))
        assert error.hint
        return
    assert error is None, error
    got = world.runner.logits(IDS, adapter=f"row{list(ROWS).index(name)}")
    assert peft.logits is not None
    np.testing.assert_allclose(got, peft.logits, atol=3e-5, rtol=3e-6)
    if name != NO_EFFECT:
        assert np.abs(got - world.runner.logits(IDS)).max() > 0.05


@pytest.mark.parametrize("name", ROWS)
def test_inspect_and_export_decide_alike(name: str, world: World) -> None:
    row, folder = ROWS[name], world.folders[name]
    base = resolve_base(world.base)
    try:
        refusals = [str(x.message) for x in inspect_adapter(folder, base).modes["switchable"]]
    except AdapterError as error:  # without a config there is nothing to inspect
        refusals = [str(error)]
    if name == NO_EFFECT:
        assert "no effect: lora_alpha is 0" in refusals[0]
        with pytest.raises(AdapterError, match="no effect: lora_alpha is 0"):
            lora_edge.export(world.base, {"x": folder}, output=folder.parent / "none")
        return
    assert bool(refusals) is (row.ours != EXACT), refusals
    assert not refusals or re.search(row.ours, refusals[0])


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if "tensors" in row.peft])
def test_the_reference_refuses_what_peft_leaves_out(name: str, world: World) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.base)
    with pytest.raises(AdapterError, match=r"PEFT (drops|lacks)"):
        attached(model, world.folders[name], "other")


@pytest.mark.parametrize("name", ROWS)
def test_missing_and_unexpected_keys_are_pefts(name: str, world: World) -> None:
    peft = _load(world.base, world.folders[name])
    if peft.logits is None or not (world.folders[name] / WEIGHTS).is_file():
        return
    manifest = load_bundle(world.bundle).manifest
    layers = {**manifest.uncovered, **manifest.sites}
    view = BaseView(layers, manifest.tied, manifest.head)
    config = read_config(world.folders[name])
    if config["target_modules"] is None:
        return  # refused: PEFT's own table decides
    keys = tensor_keys(world.folders[name] / WEIGHTS)
    found = loading(config, keys, view)
    unknown = {key for key in keys if parse_peft_key(key) is None}
    outside = {
        key
        for key in keys
        if (parsed := parse_peft_key(key)) is not None
        and parsed.part != "saved"
        and parsed.path not in layers
    }
    ours = set(found.unexpected) | unknown | outside
    # PEFT has given these a suffix before it looks for them.
    assert {re.sub("_vector$", "_vector.weight", key) for key in ours} == peft.unexpected
    assert set(found.missing) == peft.missing
    assert not found.failure


@pytest.mark.parametrize(
    "name",
    [
        "`.default.` in the keys",
        "a tied embedding saved with `ensure_weight_tying`",
        "`target_parameters` of a linear layer",
    ],
)
def test_the_export_proves_it_merged_too(name: str, world: World, tmp_path: Path) -> None:
    lora_edge.export(world.base, {"x": world.folders[name]}, "merged", tmp_path / "out")
    wanted = _load(world.base, world.folders[name]).logits
    assert wanted is not None
    got = lora_edge.Runner(tmp_path / "out").logits(IDS)
    np.testing.assert_allclose(got, wanted, atol=3e-5, rtol=3e-6)


def test_a_folder_of_mlx_does_what_it_did_in_peft(world: World, tmp_path: Path) -> None:
    plain = world.folders["as PEFT saves it"]
    factors: dict[str, dict[str, NDArray[np.float32]]] = {}
    for key, value in load_file(plain / WEIGHTS).items():
        path, _, part = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        factors.setdefault(path, {})[part.lower()] = np.ascontiguousarray(value.T)
    tensors = {f"{path}.{part}": x for path, parts in factors.items() for part, x in parts.items()}
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 3, "scale": 4 / 3}}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapters.safetensors")
    lora_edge.add(world.bundle, {"mlx": tmp_path}, world.base)
    got = lora_edge.Runner(world.bundle).logits(IDS, adapter="mlx")
    wanted = _load(world.base, plain).logits
    assert wanted is not None
    np.testing.assert_allclose(got, wanted, atol=3e-5, rtol=3e-6)
    assert inspect_adapter(tmp_path, resolve_base(world.base)).path == str(tmp_path)
    # PEFT has no such loader.
    assert _load(world.base, tmp_path).logits is None


def test_one_cause_on_many_layers_is_one_line(world: World) -> None:
    folder = world.folders["keys of the bare decoder (no `model.`)"]
    modes = inspect_adapter(folder, resolve_base(world.base)).modes
    (refusal,) = modes["merged"]
    assert refusal.message.endswith("; the same for 3 more")


def test_another_base_is_a_notice(world: World, tmp_path: Path) -> None:
    base = resolve_base(world.base)
    folder = Path(shutil.copytree(world.folders["as PEFT saves it"], tmp_path / "a"))
    for named, told in (("org/another", True), (str(world.base), False), (None, False)):
        config = json.loads((folder / CONFIG).read_text()) | {"base_model_name_or_path": named}
        (folder / CONFIG).write_text(json.dumps(config))
        found = inspect_adapter(folder, base)
        assert not found.refused
        assert any("org/another, the one given is" in x for x in found.warnings) is told


def test_a_pattern_key_that_hits_nothing_is_a_notice(world: World) -> None:
    for name in ("a rank pattern that hits nothing", "an alpha pattern that hits nothing"):
        found = inspect_adapter(world.folders[name])
        assert any("decides for none" in warning for warning in found.warnings)


def test_the_documentation_has_the_table() -> None:
    text = DOC.read_text(encoding="utf-8")
    for line in table():
        assert line in text, "print it with: python tests/export/odd_folders.py"
    assert len(ROWS) >= 30
