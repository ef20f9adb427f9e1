"""Mixture-of-experts decoders from export to bundle, with an adapter on their attention."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

import lora_edge
from lora_edge.cli import main
from tests.support.adapters import make_adapter
from tests.support.examples import examples
from tests.support.families import make_base

pytestmark = pytest.mark.skipif(
    transformers.__version__ < "5", reason="transformers 4 has no stacked experts"
)
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Few of many experts, so that a single token takes the sparse branch of the fused form.
_EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 9, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("form", examples(["fused", "portable"], ["fused"]))
@pytest.mark.parametrize("family", examples(_EXPERTS, ["qwen3_moe"]))
def test_attention_adapter_in_both_modes(
    family: str, form: Literal["fused", "portable"], tmp_path: Path
) -> None:
    base = make_base(family, tmp_path / "base", **_EXPERTS[family])
    adapter = make_adapter(base, tmp_path / "a", r=3, lora_alpha=4, target_modules=_ATTENTION)
    switchable, merged = tmp_path / "s", tmp_path / "m"
    bundle = lora_edge.export(base, {"a": adapter}, output=switchable, form=form)
    assert bundle.manifest.adapters["a"].proved
    lora_edge.export(base, {"a": adapter}, "merged", merged, form=form)
    for directory in (switchable, merged):  # against PyTorch, the export has done it
        recorded = lora_edge.validate(directory)
        assert recorded.passed, recorded.table()
    ids = np.random.default_rng(0).integers(3, 256, (2, 11))
    runner, other = lora_edge.Runner(switchable), lora_edge.Runner(merged)
    on, off = runner.logits(ids, adapter="a"), runner.logits(ids)
    np.testing.assert_allclose(other.logits(ids), on, atol=1e-5)
    assert np.abs(on - off).max() > 0.01
    mixed = runner.logits(ids, adapter=["a", None])
    np.testing.assert_allclose(mixed[0], on[0], atol=1e-5)
    np.testing.assert_allclose(mixed[1], off[1], atol=1e-5)


_TARGETS = {
    "mixtral": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "qwen3_moe": ["mlp.experts.down_proj"],
}


@pytest.mark.parametrize("family", examples(_TARGETS, ["mixtral"]))
def test_target_parameters_are_merged_exactly(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The export proves it against PEFT; without the experts' share the outputs are others."""
    base = make_base(family, tmp_path / "base", **_EXPERTS[family])
    adapter = make_adapter(
        base,
        tmp_path / "a",
        r=3,
        lora_alpha=4,
        target_modules=["q_proj"],
        target_parameters=_TARGETS[family],
    )
    form: Literal["fused", "portable"] = "fused" if family == "mixtral" else "portable"
    lora_edge.export(base, {"a": adapter}, "merged", tmp_path / "m", form=form)
    report = lora_edge.validate(tmp_path / "m")
    assert report.passed, report.table()
    figures = next(case.figures for case in report.cases if case.figures)
    assert figures is not None
    assert figures.effect_error <= 1e-4
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    assert sum("experts" in key for key in tensors) == 4 * len(_TARGETS[family])
    save_file({k: v * np.float32("experts" not in k) for k, v in tensors.items()}, file)
    lora_edge.export(base, {"a": adapter}, "merged", tmp_path / "q", form=form)
    ids = np.random.default_rng(0).integers(3, 256, (2, 11))
    whole, without = (lora_edge.Runner(tmp_path / x).logits(ids) for x in ("m", "q"))
    assert np.abs(whole - without).max() > 1e3 * figures.logit_error
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(base), "-a", f"a={adapter}", "-o", str(tmp_path / "s")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "target_parameters" in said
    assert "switchable" in said
    assert "--mode merged" in said
    assert not (tmp_path / "s").exists()


def test_a_router_that_is_a_linear_layer_by_name_only_takes_no_branch(tmp_path: Path) -> None:
    """Phi-3.5-MoE's is a subclass of `nn.Linear` that works on flattened tokens."""
    base = make_base("phimoe", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "a", r=3, lora_alpha=4, target_modules=_ATTENTION)
    bundle = lora_edge.export(base, {"a": adapter}, output=tmp_path / "s", form="portable")
    sites = {path.removeprefix("model.layers.0.self_attn.") for path in bundle.manifest.sites}
    assert set(_ATTENTION) <= sites
    assert not [path for path in sites if path.endswith("router")]
    runner = lora_edge.Runner(tmp_path / "s")
    ids = np.random.default_rng(0).integers(3, 256, (3, 7))
    mixed = runner.logits(ids, adapter=[None, "a", None])
    np.testing.assert_allclose(mixed[1], runner.logits(ids[1:2], adapter="a")[0], atol=1e-5)
    assert np.abs(mixed[1] - runner.logits(ids[1:2])[0]).max() > 0.01


def test_shared_expert_takes_an_adapter(tmp_path: Path) -> None:
    """Its gates for each row of a mixed batch need activations that are not flattened."""
    base = make_base("granitemoeshared", tmp_path / "base")
    targets = ["shared_mlp.input_linear", "shared_mlp.output_linear"]
    adapter = make_adapter(base, tmp_path / "a", r=3, lora_alpha=8, target_modules=targets)
    bundle = lora_edge.export(base, {"a": adapter}, output=tmp_path / "s")
    assert bundle.manifest.adapters["a"].proved
    runner = lora_edge.Runner(tmp_path / "s")
    ids = np.random.default_rng(0).integers(3, 256, (3, 7))
    mixed = runner.logits(ids, adapter=[None, "a", {"a": 0.5}])
    for row, state in enumerate([None, "a", {"a": 0.5}]):
        alone = runner.logits(ids[row : row + 1], adapter=state)
        np.testing.assert_allclose(mixed[row], alone[0], atol=1e-5)
    assert np.abs(mixed[1] - runner.logits(ids[1:2])[0]).max() > 0.01


def _layers_of_experts(base: Path, directory: Path, block: str, names: list[str]) -> Path:
    """An adapter as transformers 4 had it written: a pair for each layer of each expert."""
    adapter = make_adapter(base, directory, r=3, lora_alpha=4, target_modules=["q_proj"])
    config = json.loads((base / "config.json").read_text())
    count = config.get("num_local_experts") or config["num_experts"]
    hidden = config["hidden_size"]
    inner = config.get("moe_intermediate_size") or config["intermediate_size"]
    random = np.random.default_rng(1)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for layer in range(2):
        for expert in range(count):
            for name in names:
                sizes = (inner, hidden) if name in ("w2", "down_proj") else (hidden, inner)
                key = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{name}"
                a, b = random.normal(size=(3, sizes[0])), random.normal(size=(sizes[1], 3))
                tensors[f"{key}.lora_A.weight"] = (a * 0.3).astype(np.float32)
                tensors[f"{key}.lora_B.weight"] = (b * 0.3).astype(np.float32)
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["target_modules"] = ["q_proj", *names]
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return adapter


@pytest.mark.parametrize(
    ("family", "block", "names"),
    examples(
        [
            ("mixtral", "block_sparse_moe", ["w1", "w2", "w3"]),
            ("qwen3_moe", "mlp", ["gate_proj", "up_proj", "down_proj"]),
        ],
        lambda row: row[0] == "mixtral",
    ),
)
def test_layers_of_single_experts_are_merged_exactly(
    family: str, block: str, names: list[str], tmp_path: Path
) -> None:
    """The export proves it against PEFT, which stacks such an adapter when it loads it."""
    base = make_base(family, tmp_path / "base", **_EXPERTS[family])
    adapter = _layers_of_experts(base, tmp_path / "a", block, names)
    lora_edge.export(base, {"a": adapter}, "merged", tmp_path / "m")
    report = lora_edge.validate(tmp_path / "m")
    assert report.passed, report.table()
    figures = next(case.figures for case in report.cases if case.figures)
    assert figures is not None
    assert figures.effect_error <= 1e-4
    plain = make_adapter(base, tmp_path / "q", r=3, lora_alpha=4, target_modules=["q_proj"])
    lora_edge.export(base, {"a": plain}, "merged", tmp_path / "mq")
    ids = np.random.default_rng(0).integers(3, 256, (2, 11))
    whole, without = (lora_edge.Runner(tmp_path / x).logits(ids) for x in ("m", "mq"))
    assert np.abs(whole - without).max() > 1e3 * figures.logit_error
    with pytest.raises(lora_edge.UnsupportedAdapterError, match="one expert") as caught:
        lora_edge.export(base, {"a": adapter}, output=tmp_path / "out")
    assert "switchable" in str(caught.value)
    assert "--mode merged" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_what_peft_cannot_load_itself_is_no_unexpected_fault(tmp_path: Path) -> None:
    """PEFT stacks w3 with w1 only; there is nothing to prove against."""
    base = make_base("mixtral", tmp_path / "base", **_EXPERTS["mixtral"])
    adapter = _layers_of_experts(base, tmp_path / "a", "block_sparse_moe", ["w3"])
    with pytest.raises(lora_edge.AdapterError, match="PEFT cannot load") as caught:
        lora_edge.export(base, {"a": adapter}, "merged", tmp_path / "m")
    assert "w3" in str(caught.value)
    assert caught.value.hint
    assert not (tmp_path / "m").exists()


def test_router_takes_no_branch(tmp_path: Path) -> None:
    base = make_base("mixtral", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "a", r=3, target_modules=["q_proj"])
    key = "base_model.model.model.layers.0.mlp.gate"
    tensors = {
        f"{key}.lora_A.weight": np.ones((3, 64), np.float32),
        f"{key}.lora_B.weight": np.ones((6, 3), np.float32),
    }
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["gate"]}))
    with pytest.raises(lora_edge.AdapterError, match=r"layers\.0\.mlp\.gate.*no such site"):
        lora_edge.export(base, {"a": adapter}, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("mixtral", ["w1", "w2", "w3"]),
        ("qwen3_moe", [*_ATTENTION, "gate_proj", "up_proj", "down_proj"]),
    ],
)
def test_the_usual_names_of_experts_are_merged_exactly(
    family: str, targets: list[str], tmp_path: Path
) -> None:
    """PEFT makes ``target_parameters`` of them, with patterns for what transformers has fused."""
    base = make_base(family, tmp_path / "base", **_EXPERTS[family])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = make_adapter(base, tmp_path / "a", r=2, lora_alpha=3, target_modules=targets)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    assert set(config["target_parameters"]) == {"gate_up_proj", "down_proj"}
    bundle = lora_edge.export(base, {"a": adapter}, "merged", tmp_path / "out")
    assert bundle.manifest.adapters["a"].proved  # against PEFT's unmerged forward
    with pytest.raises(lora_edge.AdapterError, match="an expert's weights are chosen"):
        lora_edge.export(base, {"a": adapter}, output=tmp_path / "none")
