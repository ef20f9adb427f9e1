"""Each kind that the trainer makes learns, is loaded by PEFT, and is exported exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lora_edge
from lora_edge.base.checkpoint import resolve_base
from lora_edge.training import train
from lora_edge.training.callbacks import read_metrics
from lora_edge.training.model import load_model, load_tokenizer
from tests.support.examples import examples
from tests.support.paths import ROOT

BASE = ROOT / "models" / "tiny-llama"
START, BOUND = 1.5, 0.3  # nats per token: what the base is above of, what training must reach
KINDS: dict[str, dict[str, Any]] = {
    "loraplus": {"loraplus_ratio": 8.0, "lr": 2e-3},
    "rslora": {"rslora": True, "alpha": 8.0},
    "dora": {"dora": True},
    "pissa": {"init": "pissa", "lr": 6e-3},
}


@pytest.fixture(scope="module")
def shouted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "shouted.jsonl"
    words = ("river", "stone", "cloud", "apple")
    rows = [{"prompt": f"Word: {w} Answer:", "completion": f" {w.upper()}!"} for w in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "kind",
    examples(KINDS, ["pissa"]),
)
def test_each_kind_learns_and_is_exported_exactly(kind: str, shouted: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    options = {"rank": 4, "lr": 1e-2, "batch_size": 4, "max_steps": 30, **KINDS[kind]}
    made = train(BASE, shouted, tmp_path / kind, **options)
    losses = [row["loss"] for row in read_metrics(made / "metrics.jsonl")]
    assert losses[0] > START
    assert losses[-1] < BOUND

    config = json.loads((made / "adapter_config.json").read_text())
    assert config["use_dora"] == (kind == "dora")
    assert config["use_rslora"] == (kind == "rslora")
    if kind == "pissa":  # converted: for the base as it was, at twice the rank
        assert (config["init_lora_weights"], config["r"]) == (True, 8)
    loaded = PeftModel.from_pretrained(load_model(resolve_base(BASE)), made).eval()
    tokenizer = load_tokenizer(resolve_base(BASE))
    batch = tokenizer("Word: river Answer: ", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(loaded(batch).logits[0, -1].argmax()) == "R"
        with loaded.disable_adapter():
            assert tokenizer.decode(loaded(batch).logits[0, -1].argmax()) != "R"

    # Published only if every case equals eager PEFT, and an adapter without effect is no pass.
    bundle = lora_edge.export(BASE, {kind: made}, output=tmp_path / "bundle")
    assert bundle.manifest.adapters[kind].proved


def test_loraplus_gives_b_the_larger_rate(shouted: Path, tmp_path: Path) -> None:
    """AdamW's first step moves each weight by about its learning rate."""
    options: dict[str, Any] = {"rank": 4, "lr": 1e-3, "max_steps": 1, "warmup": 0.0}
    plus = load_file(
        train(BASE, shouted, tmp_path / "plus", **options, loraplus_ratio=16.0)
        / "adapter_model.safetensors"
    )
    plain = load_file(
        train(BASE, shouted, tmp_path / "plain", **options) / "adapter_model.safetensors"
    )
    for key in plain:
        if "lora_B" in key:
            assert plus[key].abs().max() == pytest.approx(16e-3, rel=0.01)
            assert plain[key].abs().max() == pytest.approx(1e-3, rel=0.01)
        else:
            torch.testing.assert_close(plus[key], plain[key])
