"""PiSSA and its like change the base while they train; converted, they are exact on the original.

The oracle is PEFT's model on its changed base, before it is saved.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import preprocess_loraga
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import lora_edge
from lora_edge.adapter.load import load_adapter
from tests.support.examples import examples

IDS = np.random.default_rng(2).integers(0, 250, (2, 10))
TARGETS = ["q_proj", "v_proj", "down_proj"]
# W - BA and W + (B'A' - BA) are rounded to float32 once each.
ROUNDING = 2e-4


def _corda(model: Any, config: LoraConfig) -> None:
    """What ``peft.tuners.lora.corda.preprocess_corda`` leaves on each layer; it needs ``attrs``."""
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in TARGETS:
            weight = module.weight.detach()
            inputs = torch.randn(200, weight.shape[1])
            covariance = inputs.T @ inputs / 200
            u, s, vh = torch.linalg.svd(weight @ covariance, full_matrices=False)
            v = (vh @ torch.linalg.inv(covariance)).T
            module.eigens = SimpleNamespace(
                U_WC=u[:, : config.r], S_WC=s[: config.r], V_WC=v[:, : config.r]
            )


def _lora_ga(model: Any, config: LoraConfig) -> None:
    def step() -> None:
        ids = torch.tensor(IDS)
        model(ids, labels=ids).loss.backward()

    preprocess_loraga(model, config, step)


def _loftq(model: Any, config: LoraConfig) -> None:  # noqa: ARG001
    """Ask for LoftQ; the config's constructor would ask for scipy, which nothing uses any more."""
    config.init_lora_weights = "loftq"
    config.loftq_config = {"loftq_bits": 4, "loftq_iter": 2}


# The 16 values of NF4 (Dettmers et al. 2023, appendix E).
NF4 = torch.tensor(
    [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
     0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)  # fmt: skip


def _loftq_on_cpu(
    weight: Any, num_bits: int, reduced_rank: int, num_iter: int
) -> tuple[Any, Any, Any]:
    """``peft.utils.loftq_utils.loftq_init`` but for its quantizer, which needs a GPU."""
    assert num_bits == 4
    rest = weight.clone()
    for _ in range(num_iter):
        blocks = rest.reshape(-1, 64)
        scale = blocks.abs().amax(1, keepdim=True)
        codes = (blocks / scale)[..., None].sub(NF4).abs().argmin(-1)
        quantized = (NF4[codes] * scale).reshape(weight.shape)
        parts = _low_rank_decomposition(weight - quantized, reduced_rank=reduced_rank)
        rest = weight - parts["L"] @ parts["R"]
    return quantized, parts["R"], parts["L"]


INITS: dict[str, tuple[dict[str, Any], Callable[[Any, LoraConfig], None] | None]] = {
    "pissa": ({}, None),
    "pissa_niter_4": ({"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 3}}, None),
    "olora": ({"use_rslora": True}, None),
    "corda": ({"corda_config": CordaConfig()}, _corda),
    "lora_ga": ({"lora_ga_config": LoraGAConfig()}, _lora_ga),
}
LOFTQ = {"loftq": ({"init_lora_weights": True}, _loftq)}


@dataclass(frozen=True)
class Trained:
    """A trained adapter, saved as it is and converted, and what PEFT says of it."""

    plain: Path
    converted: Path
    residual: Path
    logits: NDArray[np.float32]


def _logits(model: Any) -> NDArray[np.float32]:
    with torch.no_grad():
        found: NDArray[np.float32] = model.eval()(torch.tensor(IDS)).logits.numpy()
    return found


def _train(base: Path, init: str, directory: Path, **fields: Any) -> Trained:
    settings, prepare = {**INITS, **LOFTQ}[init]
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base)
    common = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": init}
    config = LoraConfig(task_type="CAUSAL_LM", **{**common, **settings, **fields})
    if prepare is not None:
        prepare(model, config)
    adapted = get_peft_model(model, config)
    # Saving resets init_lora_weights, so that loading it does not change the base once more.
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(directory / "initial")
    adapted.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3 * parameter.std())
    logits = _logits(adapted)
    adapted.save_pretrained(directory / "plain")
    if not (fields.get("use_rslora") and fields.get("rank_pattern")):
        adapted.save_pretrained(
            directory / "converted",
            path_initial_model_for_weight_conversion=str(directory / "initial"),
        )
    adapted.unload().save_pretrained(directory / "residual")
    return Trained(directory / "plain", directory / "converted", directory / "residual", logits)


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    root = tmp_path_factory.mktemp("trained")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, on what its own initializations assume
        return {init: _train(base, init, root / init) for init in INITS}


@pytest.fixture(scope="module")
def switchable(
    base: Path, trained: dict[str, Trained], tmp_path_factory: pytest.TempPathFactory
) -> lora_edge.Runner:
    output = tmp_path_factory.mktemp("switchable") / "out"
    lora_edge.export(base, {k: v.converted for k, v in trained.items()}, output=output)
    return lora_edge.Runner(output)


# PEFT's, of the config that it saved itself.
@pytest.mark.filterwarnings("ignore:.*_config. specified but will be ignored:UserWarning")
@pytest.mark.parametrize("init", examples(INITS, ["pissa_niter_4", "olora"]))
def test_converted_is_exact_on_the_original_base(
    init: str,
    base: Path,
    trained: dict[str, Trained],
    switchable: lora_edge.Runner,
    tmp_path: Path,
) -> None:
    found = trained[init]
    ranks = load_adapter(found.converted).ranks()
    assert set(ranks.values()) == ({4, 8} if init == "pissa_niter_4" else {8})
    got = switchable.logits(IDS, adapter=init)
    np.testing.assert_allclose(got, found.logits, atol=ROUNDING)
    assert np.abs(got - switchable.logits(IDS)).max() > 100 * ROUNDING
    lora_edge.export(base, {init: found.converted}, "merged", tmp_path / "out")
    merged = lora_edge.Runner(tmp_path / "out").logits(IDS)
    np.testing.assert_allclose(merged, found.logits, atol=ROUNDING)
    # The control: the same factors on the original base, as if they were an ordinary LoRA's.
    naive = _as_ordinary(found.plain, tmp_path / "naive")
    original = AutoModelForCausalLM.from_pretrained(base)
    wrong = _logits(PeftModel.from_pretrained(original, naive))
    assert np.abs(wrong - found.logits).max() > 100 * ROUNDING


@pytest.mark.parametrize("init", INITS)
def test_not_converted_is_refused(init: str, trained: dict[str, Trained]) -> None:
    with pytest.raises(lora_edge.UnsupportedAdapterError, match="init_lora_weights") as caught:
        load_adapter(trained[init].plain)
    assert "path_initial_model_for_weight_conversion" in caught.value.hint


def test_the_other_way_out_is_its_own_base(base: Path, tmp_path: Path) -> None:
    """What PEFT does not convert is exact on the base that it was trained on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = _train(base, "pissa", tmp_path, use_rslora=True, rank_pattern={"q_proj": 2})
    with pytest.raises(lora_edge.UnsupportedAdapterError, match="init_lora_weights") as caught:
        load_adapter(found.plain)
    assert "model.unload()" in caught.value.hint
    ordinary = _as_ordinary(found.plain, tmp_path / "ordinary")
    lora_edge.export(found.residual, {"a": ordinary}, output=tmp_path / "out")
    runner = lora_edge.Runner(tmp_path / "out")
    np.testing.assert_allclose(runner.logits(IDS, adapter="a"), found.logits, atol=ROUNDING)
    assert np.abs(runner.logits(IDS) - found.logits).max() > 100 * ROUNDING


# PEFT's, of the loftq_config that it saved itself.
@pytest.mark.filterwarnings("ignore:.*loftq_config. specified but will be ignored:UserWarning")
@pytest.mark.long
def test_loftq(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT converts it too, and loses what the factors did not take of the quantization error.

    So what PEFT's conversion saves is exported as what it is, a LoRA of twice the rank; and the
    model that was trained is had on its own base alone, which is what the refusal says.
    """
    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", _loftq_on_cpu)
    found = _train(base, "loftq", tmp_path)
    with pytest.raises(lora_edge.UnsupportedAdapterError, match="init_lora_weights") as caught:
        load_adapter(found.plain)
    assert "model.unload()" in caught.value.hint
    assert set(load_adapter(found.converted).ranks().values()) == {8}
    original = AutoModelForCausalLM.from_pretrained(base)
    converted = _logits(PeftModel.from_pretrained(original, found.converted))
    ordinary = _as_ordinary(found.plain, tmp_path / "ordinary")
    rows = {
        "converted": (base, found.converted, converted),
        "own": (found.residual, ordinary, found.logits),
    }
    for name, (own_base, adapter, expected) in rows.items():
        for mode in ("switchable", "merged"):
            output = tmp_path / name / mode
            lora_edge.export(own_base, {"a": adapter}, mode, output)  # type: ignore[arg-type]
            active = "a" if mode == "switchable" else None
            got = lora_edge.Runner(output).logits(IDS, adapter=active)
            np.testing.assert_allclose(got, expected, atol=ROUNDING)
        plain = lora_edge.Runner(tmp_path / name / "switchable").logits(IDS)
        assert np.abs(plain - expected).max() > 100 * ROUNDING
    # The controls: what the conversion lost, and the same factors on the original base.
    assert np.abs(converted - found.logits).max() > 100 * ROUNDING
    original = AutoModelForCausalLM.from_pretrained(base)
    wrong = _logits(PeftModel.from_pretrained(original, ordinary))
    assert np.abs(wrong - found.logits).max() > 100 * ROUNDING


def _as_ordinary(adapter: Path, directory: Path) -> Path:
    directory.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["init_lora_weights"] = True
    (directory / "adapter_config.json").write_text(json.dumps(config))
    name = "adapter_model.safetensors"
    save_file(load_file(adapter / name), directory / name)
    return directory
