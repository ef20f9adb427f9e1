"""A blend is the weighted sum of effects: PEFT's ``cat`` for plain LoRA, no other combination."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoModelForCausalLM

import lora_edge

IDS = np.random.default_rng(4).integers(0, 250, (2, 9))
# PEFT's cat scales the sum by sqrt(R) too much where the first adapter is an rsLoRA.
BLENDS: list[dict[str, float]] = [
    {"plain": 0.7, "varied": 0.3},
    {"plain": 1.5, "rooted": 0.25},
    {"varied": 1.0, "rooted": 1.0, "plain": 0.5},
]


@pytest.fixture(scope="module")
def adapted(base: Path, adapters: dict[str, Path]) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    for name, path in adapters.items():
        if isinstance(model, PeftModel):
            model.load_adapter(path, name)
        else:
            model = PeftModel.from_pretrained(model, path, name)
    return model.eval()


def _combined(adapted: Any, blend: dict[str, float], kind: str) -> NDArray[np.float32]:
    adapted.add_weighted_adapter(list(blend), list(blend.values()), "blend", combination_type=kind)
    try:
        adapted.set_adapter("blend")
        with torch.no_grad():
            found: NDArray[np.float32] = adapted(torch.tensor(IDS)).logits.numpy()
        return found
    finally:
        adapted.set_adapter("plain")
        adapted.delete_adapter("blend")


@pytest.mark.parametrize("blend", BLENDS, ids=str)
def test_a_blend_is_pefts_cat(blend: dict[str, float], exported: Path, adapted: Any) -> None:
    runner = lora_edge.Runner(exported)
    got = runner.logits(IDS, adapter=blend)
    np.testing.assert_allclose(got, _combined(adapted, blend, "cat"), atol=2e-5)
    for name in blend:  # each of them counts
        rest = {key: weight for key, weight in blend.items() if key != name}
        assert np.abs(runner.logits(IDS, adapter=rest) - got).max() > 0.01


def test_another_combination_is_made_by_peft_and_exported(
    base: Path, adapters: dict[str, Path], adapted: Any, tmp_path: Path
) -> None:
    """``svd`` is no sum of effects; the way out is to export what PEFT made of it."""
    blend = {"plain": 0.7, "varied": 0.3}
    adapted.add_weighted_adapter(
        list(blend), list(blend.values()), "combined", combination_type="svd", svd_rank=3
    )
    try:
        adapted.save_pretrained(tmp_path, selected_adapters=["combined"])
        adapted.set_adapter("combined")
        with torch.no_grad():
            expected = adapted(torch.tensor(IDS)).logits.numpy()
    finally:
        adapted.set_adapter("plain")
        adapted.delete_adapter("combined")
    paths = {name: adapters[name] for name in blend} | {"combined": tmp_path / "combined"}
    lora_edge.export(base, paths, output=tmp_path / "out")
    runner = lora_edge.Runner(tmp_path / "out")
    got = runner.logits(IDS, adapter="combined")
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert np.abs(got - runner.logits(IDS, adapter=blend)).max() > 0.01
