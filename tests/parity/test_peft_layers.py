"""PyTorch with an adapter merged, then rounded: small and by layer, and whether PEFT agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_edge.base.checkpoint import resolve_base
from lora_edge.base.layers import built_layers
from lora_edge.errors import ParityError
from lora_edge.maths.quantization import Quantization
from lora_edge.parity import by_layer
from lora_edge.parity.merging import merged_changes
from lora_edge.parity.plan.states import BASE, only
from lora_edge.parity.reference import Reference
from lora_edge.tasks.task import TEXT
from tests.support.kinds import make_kinds

ROW = np.random.default_rng(2).integers(0, 256, 12).tolist()
NAMES = ("dora", "lora-bias", "embedding-and-head", "tokens", "saved-linear")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    return make_kinds("llama", tmp_path_factory.mktemp("layers"), NAMES)


def _quantization(base: Path) -> Quantization:
    modules = built_layers(resolve_base(base), TEXT).modules
    layers = tuple(x for x, layer in modules.items() if layer.kind in ("linear", "embedding"))
    return Quantization(4, 32, layers, bits_of={layers[0]: 8}, merged_first=True)


def _logits(base: Path, adapters: dict[str, Path]) -> dict[str, np.ndarray]:
    reference = Reference(resolve_base(base), TEXT, _quantization(base))
    for name, directory in adapters.items():
        reference.attach(name, directory)
    states = {"": BASE, **{name: only(name) for name in adapters}}
    return {name: reference.logits([ROW], [state])[0] for name, state in states.items()}


def _by_hand(base: Path, name: str, directory: Path) -> np.ndarray:
    """The base's own model with weights that were merged in numpy, and rounded, and no PEFT."""
    quantization, found = _quantization(base), resolve_base(base)
    model: Any = Reference(found, TEXT).bare
    built = built_layers(found, TEXT)
    changes = merged_changes(built, TEXT, name, directory)
    for path in quantization.layers:
        module = model.get_submodule(path)
        weight = module.weight.detach().numpy()
        change = changes.get(f"{path}.weight")
        if change is not None:
            weight = change(weight.astype(np.float64)).astype(np.float32)
        values = torch.from_numpy(quantization.rounded(path, weight))
        module.weight = torch.nn.Parameter(values, requires_grad=False)
        shift = changes.get(f"{path}.bias")
        if shift is not None:
            module.bias = torch.nn.Parameter(torch.from_numpy(shift(None)).float())
    with torch.no_grad():
        logits: np.ndarray = model(input_ids=torch.tensor([ROW])).logits[0].numpy()
    return logits


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_the_base_with_rounded_sums(
    name: str, made: tuple[Path, dict[str, Path]]
) -> None:
    base, adapters = made
    found = _logits(base, {name: adapters[name]})
    wanted = _by_hand(base, name, adapters[name])
    np.testing.assert_allclose(found[name], wanted, atol=2e-5)
    # The controls: neither the rounded base, nor the adapter over it, nor the adapter in floats.
    assert np.abs(found[""] - wanted).max() > 0.01
    for quantization in (None, Quantization(4, 32, _quantization(base).layers)):
        other = Reference(resolve_base(base), TEXT, quantization)
        other.attach(name, adapters[name])
        assert np.abs(other.logits([ROW], [only(name)])[0] - wanted).max() > 1e-3


def test_a_large_model_gives_the_same(
    made: tuple[Path, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapters = made
    small = _logits(base, adapters)
    monkeypatch.setattr(by_layer, "WHOLE", 0)
    large = _logits(base, adapters)
    assert small.keys() == large.keys()
    for name, logits in small.items():
        np.testing.assert_allclose(large[name], logits, atol=2e-5)


def test_a_sum_that_is_not_pefts_is_no_proof(
    made: tuple[Path, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """W + 1.001 ΔW in one layer."""
    base, adapters = made

    def wrong(*arguments: Any) -> dict[str, Any]:
        changes = dict(merged_changes(*arguments))
        path = next(path for path in changes if "down_proj" in path)
        right = changes[path]
        changes[path] = lambda weight: weight + 1.001 * (right(weight) - weight)
        return changes

    monkeypatch.setattr("lora_edge.parity.reference_models.merged_changes", wrong)
    with pytest.raises(ParityError, match=r"down_proj is not W \+ ΔW.*1\.0e-03"):
        _logits(base, {"dora": adapters["dora"]})
