"""``lora-edge inspect``: what an adapter carries, which modes take it, how it fits a base."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import lora_edge
from lora_edge.adapter.load import load_adapter
from lora_edge.base.checkpoint import resolve_base
from lora_edge.bundle.bundle import load_bundle
from lora_edge.fit.inspect import inspect_adapter
from lora_edge.maths.lora import full_rank
from tests.support.commands import Cli
from tests.support.kinds import ROWS, make_kind, make_kind_base
from tests.support.norms import assert_norms_are_pefts
from tests.support.paths import MODELS

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Base and adapter of a row, made once."""
    root = tmp_path_factory.mktemp("kinds")

    def make(name: str) -> tuple[Path, Path]:
        row = ROWS[name]
        base = root / row.base
        if not base.exists():
            make_kind_base(row.base, base)
        if not (root / name).exists():
            make_kind(base, row, root / name)
        return base, root / name

    return make


def _changed(adapter: Path, copy: Path, **fields: Any) -> Path:
    shutil.copytree(adapter, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | fields))
    return copy


def test_each_module_is_shown(cli: Cli, adapters: dict[str, Path]) -> None:
    text = cli("inspect", adapters["mirror"])
    assert (text.code, text.err) == (0, "")
    assert "21 low-rank modules, rank 16" in text.out
    assert "switchable yes" in text.out
    assert "merged     yes" in text.out
    facts = json.loads(cli("inspect", adapters["mirror"], "--json").out)
    assert facts["modes"] == {"switchable": [], "merged": []}
    assert facts["base_model"] == "models/tiny-llama"
    assert facts["modules"]["model.layers.0.mlp.gate_proj"] == {
        "kind": "linear", "rank": 16, "alpha": 16.0, "scaling": 4.0, "in_features": 192,
        "out_features": 384, "dora": False, "bias": False, "relative_norm": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["patterns", "dora", "embedding", "embedding-dora", "conv1d", "conv1d-dora"]
)
def test_norms_are_those_of_pefts_merged_weights(name: str, kinds: Any) -> None:
    base, adapter = kinds(name)
    found = inspect_adapter(adapter, resolve_base(base))
    model = AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied embeddings: only the layer itself is read here
        adapted = PeftModel.from_pretrained(model, adapter).base_model.model
    assert found.modules
    assert_norms_are_pefts(found, adapted)
    for module in found.modules.values():
        assert module.dora == ("dora" in name)
    if "dora" in name:
        # Leaving out DoRA's gain would be another number.
        path, pair = next(iter(load_adapter(adapter).modules.items()))
        weight = np.linalg.norm(resolve_base(base).parameter(f"{path}.weight"))
        plain = np.linalg.norm(pair.delta()) / weight
        assert abs(plain / found.modules[path].relative_norm - 1) > 1e-3


def test_a_head_tied_to_the_embedding_is_measured_too(kinds: Any) -> None:
    base, adapter = kinds("embedding-and-head")
    found = inspect_adapter(adapter, resolve_base(base))
    weight = torch.nn.Module.get_parameter(
        AutoModelForCausalLM.from_pretrained(base), "model.embed_tokens.weight"
    )
    expected = np.linalg.norm(load_adapter(adapter).modules["lm_head"].delta())
    norm = found.modules["lm_head"].relative_norm
    assert norm == pytest.approx(expected / float(weight.detach().norm()), rel=1e-5)
    assert {path: copy.equal for path, copy in found.copies.items()} == {
        "lm_head.weight": True,
        "model.embed_tokens.weight": True,
    }
    assert not found.refused


@pytest.mark.parametrize("name", ROWS)
def test_both_modes_are_told_for_every_kind(
    name: str, kinds: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the export takes (tests/export/test_kinds.py) is taken here too, and the reverse."""
    base, _ = kinds(name)
    monkeypatch.chdir(base.parent)
    facts = json.loads(cli("inspect", name, "--base", base.name, "--json").out)
    assert facts["modes"]["switchable"] == []
    assert bool(facts["modes"]["merged"]) is (not ROWS[name].merged)
    text = cli("inspect", name, "--base", base.name)
    assert (text.code, text.err) == (0, "")
    assert max(map(len, text.out.splitlines())) <= 80
    for path in (*facts["modules"], *facts["saved"], *facts["tokens"]):
        assert path in text.out
    # The same base with another width takes none of them.
    narrow = make_kind_base_of_another_width(ROWS[name].base, base.parent / f"{base.name}-narrow")
    refused = json.loads(cli("inspect", name, "--base", narrow, "--json").out)["modes"]
    assert refused["switchable"]
    assert all(reason["hint"] for reason in refused["switchable"])


def make_kind_base_of_another_width(key: str, directory: Path) -> Path:
    from tests.support.families import make_base
    from tests.support.kinds import BASES

    family, changes = BASES[key]
    wide = {"hidden_size": 80} | ({"n_embd": 80} if family == "gpt2" else {})
    return directory if directory.exists() else make_base(family, directory, **changes, **wide)


def test_trained_rows_reach_a_tied_output_layer(kinds: Any, cli: Cli) -> None:
    base, adapter = kinds("tokens")
    facts = json.loads(cli("inspect", adapter, "--base", base, "--json").out)
    assert facts["tokens"] == {
        "model.embed_tokens": {"indices": [3, 5], "size": 64, "reaches": "lm_head"}
    }
    assert "they reach lm_head" in " ".join(cli("inspect", adapter, "--base", base).out.split())
    alone = json.loads(cli("inspect", adapter, "--json").out)
    assert alone["tokens"]["model.embed_tokens"]["reaches"] is None
    base, adapter = kinds("tokens-untied")
    facts = json.loads(cli("inspect", adapter, "--base", base, "--json").out)
    assert facts["tokens"]["model.embed_tokens"]["reaches"] == ""


def test_what_replaces_whole_weights_says_its_cost(kinds: Any, cli: Cli) -> None:
    _, adapter = kinds("saved-head")
    saved = json.loads(cli("inspect", adapter, "--json").out)["saved"]["lm_head.weight"]
    pair = full_rank(np.zeros((256, 64)))
    assert saved["shape"] == [256, 64]
    assert saved["switchable_bytes"] == pair.A.nbytes + pair.B.nbytes
    assert f"{saved['switchable_bytes']:,} bytes" in cli("inspect", adapter).out


def test_a_copy_of_the_base_that_differs_is_named(kinds: Any, cli: Cli, tmp_path: Path) -> None:
    base, adapter = kinds("embedding")
    assert "not compared" in cli("inspect", adapter).out
    copy = Path(shutil.copytree(adapter, tmp_path / "other"))
    tensors = load_file(copy / WEIGHTS)
    key = next(key for key in tensors if key.endswith("base_layer.weight"))
    save_file(tensors | {key: tensors[key] + np.float32(0.01)}, copy / WEIGHTS)
    facts = json.loads(cli("inspect", copy, "--base", base, "--json").out)
    assert [item["equal"] for item in facts["copies"].values()] == [False]
    for reasons in facts["modes"].values():
        assert "embed_tokens.weight, which differs" in reasons[0]["message"]
    assert "DIFFERENT" in cli("inspect", copy, "--base", base).out


def test_an_alora_is_for_the_switchable_mode_only(kinds: Any, cli: Cli) -> None:
    _, adapter = kinds("alora")
    text = cli("inspect", adapter).out
    assert "switchable yes" in text
    assert "merged     no: alora_invocation_tokens is [7, 9, 11]" in text
    assert "→ Use --mode switchable." in text
    assert "activated  by the tokens [7, 9, 11]" in text
    assert "blends     no: an activated LoRA" in text


def test_everything_that_would_be_refused_is_listed(
    cli: Cli, adapters: dict[str, Path], tmp_path: Path
) -> None:
    copy = _changed(
        adapters["shout"], tmp_path / "a", layer_replication=[[0, 1]], unheard_of=3, use_rslora=True
    )
    facts = json.loads(cli("inspect", copy, "--json").out)
    assert facts["modules"] == {}
    assert len(facts["modes"]["switchable"]) == 2
    assert facts["modes"]["merged"] == facts["modes"]["switchable"]
    text = cli("inspect", copy)
    assert text.code == 0
    for part in ("REFUSED", "layer_replication", "unheard_of", "merged     no, for the same"):
        assert part in text.out


def test_stacked_parameters_are_for_the_merged_mode_only(
    adapters: dict[str, Path], cli: Cli, tmp_path: Path
) -> None:
    copy = _changed(adapters["shout"], tmp_path / "a", target_parameters=["mlp.experts.up"])
    key = "base_model.model.model.layers.0.mlp.experts"
    factors = {
        f"{key}.lora_A.weight": np.ones((4 * 8, 192), np.float32),
        f"{key}.lora_B.weight": np.ones((96, 8 * 4), np.float32),
    }
    save_file(load_file(copy / WEIGHTS) | factors, copy / WEIGHTS)
    facts = json.loads(cli("inspect", copy, "--json").out)
    assert facts["stacked"] == {
        "model.layers.0.mlp.experts": {"pairs": [[[32, 192], [96, 32]]], "scalings": {"up": 2.0}}
    }
    assert facts["modes"]["merged"] == []
    (reason,) = facts["modes"]["switchable"]
    assert "target_parameters" in reason["message"]
    assert "A [32, 192] B [96, 32], scaling of up 2" in cli("inspect", copy).out
    facts = json.loads(cli("inspect", copy, "--base", MODELS / "tiny-llama", "--json").out)
    (reason,) = facts["modes"]["merged"]  # it is for another base
    assert "no stacked parameters" in reason["message"]


def test_a_task_head_and_its_labels(adapters: dict[str, Path], cli: Cli, tmp_path: Path) -> None:
    copy = _changed(adapters["shout"], tmp_path / "a", task_type="SEQ_CLS")
    head = {"base_model.model.score.weight": np.full((2, 192), 0.1, np.float32)}
    save_file(load_file(copy / WEIGHTS) | head, copy / WEIGHTS)
    (copy / "training.json").write_text(json.dumps({"labels": ["bad", "good"]}))
    facts = json.loads(cli("inspect", copy, "--base", MODELS / "tiny-llama", "--json").out)
    assert facts["modes"] == {"switchable": [], "merged": []}
    assert facts["saved"]["score.weight"]["head"] is True
    assert facts["labels"] == ["bad", "good"]
    text = cli("inspect", copy).out
    assert "score.weight [2, 192], task head" in text
    assert "labels     bad, good" in text
    assert "blends     no: its task head replaces the base's" in text


def test_what_a_base_lacks_is_named_with_near_misses(
    cli: Cli, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(adapters["shout"], tmp_path / "a"))
    tensors = load_file(copy / WEIGHTS)
    renamed = {
        key.replace("layers.2.self_attn.q", "layers.2.attn.q"): x for key, x in tensors.items()
    }
    save_file(renamed, copy / WEIGHTS)
    facts = json.loads(cli("inspect", copy, "--base", base, "--json").out)
    (reason,) = facts["modes"]["merged"]
    assert "model.layers.2.attn.q_proj" in reason["message"]
    assert "near misses: model.layers.2.self_attn.q_proj" in reason["message"]
    norms = {path: module["relative_norm"] for path, module in facts["modules"].items()}
    assert [path for path, norm in norms.items() if norm is None] == ["model.layers.2.attn.q_proj"]


def test_the_fingerprint_of_another_base_is_named(
    cli: Cli, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    save_file(
        {key: value * np.float32(2) for key, value in tensors.items()}, other / "model.safetensors"
    )
    facts = json.loads(cli("inspect", adapters["shout"], "--base", other, "--json").out)
    (reason,) = facts["modes"]["switchable"]
    assert "fingerprint" in reason["message"]
    assert "models/tiny-llama" in reason["hint"]


def test_a_path_that_is_not_there(cli: Cli, tmp_path: Path) -> None:
    result = cli("inspect", tmp_path / "nothing")
    assert (result.code, result.out) == (2, "")
    assert "does not exist" in result.err


def test_nothing_heavy_is_imported_without_a_base() -> None:
    script = (
        "import sys\nfrom lora_edge.cli import cli\n"
        f"cli(['inspect', {str(MODELS / 'adapters' / 'shout')!r}], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'peft', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_a_bundle_is_shown(cli: Cli, bundle: Path) -> None:
    text = " ".join(cli("inspect", bundle).out.split())
    for part in ("switchable, fused form, fp32", "21 sites", "rsLoRA", "adapters of lora"):
        assert part in text
    assert text.count(" proved") == 4
    assert "cannot be blended" not in text
    facts = json.loads(cli("inspect", bundle, "--json").out)
    assert sorted(facts["adapters"]) == ["echo", "mirror", "none", "shout"]
    assert facts["bytes"] == sum(entry["bytes"] for entry in facts["files"].values())


def test_a_bundle_says_its_kinds_and_what_cannot_be_blended(
    kinds: Any, cli: Cli, tmp_path: Path
) -> None:
    base, dora = kinds("dora")
    lora_edge.export(base, {"dora": dora}, output=tmp_path / "out", kinds=("lora", "norm"))
    found = load_bundle(tmp_path / "out")
    entry = dataclasses.replace(
        found.manifest.adapters["dora"], labels=("bad", "good"), invocation=(7, 9)
    )
    adapters = {**found.manifest.adapters, "dora": entry}
    found.write_manifest(dataclasses.replace(found.manifest, adapters=adapters))
    text = cli("inspect", tmp_path / "out").out
    assert "kinds      takes adapters of dora, lora, norm" in text
    assert "cannot be blended: DoRA" in text
    assert "labels bad, good" in text
    assert "activated by the tokens [7, 9]" in text
