"""Gates and selections beside activations of any number of dimensions, for each row its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support.custom_operators import Custom, error_and_effect, load, make_custom_adapter


class Plane(nn.Module):
    """Linear layers and norms on ``[batch, h, w, n]`` and, after pooling, on ``[batch, n]``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.norm = nn.LayerNorm(4)
        self.pooled_norm = nn.LayerNorm(4)
        self.last = nn.Linear(4, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.first(x))).mean((1, 2))
        found: Tensor = self.last(self.pooled_norm(x))
        return found


# As many rows of the plane as of the batch: a gate beside the wrong axis would not fail.
@pytest.mark.parametrize("size", [(3, 5, 6), (2, 3, 6)])
def test_rows_keep_their_adapters_at_every_rank(size: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Plane().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    custom = Custom(model, torch.randn(3, *size), tmp_path / "graph")
    assert {path: entry.rank for path, entry in custom.modules.items()} == {
        "first": 4, "norm": 4, "pooled_norm": 2, "last": 3,
    }  # fmt: skip
    both = ["first", "last"]
    several = {
        "a": {"target_modules": both, "r": 2, "use_dora": True, "modules_to_save": ["norm"]},
        "b": {"target_modules": both, "r": 3, "lora_bias": True},
    }
    changes = {}
    for name, settings in several.items():
        path = make_custom_adapter(model, tmp_path / name, settings, seed=len(changes))
        adapter = load(path)
        changes[name] = custom.changes(adapter)
        error, effect = error_and_effect(
            custom.merged(adapter), custom.expected(path), custom.base()
        )
        assert error < 2e-6 * max(effect, 1)
        assert effect > 0.1
    graph = custom.switchable(changes)
    mixed = graph.mixed(["b", "a", None], graph.x)
    wanted = [custom.expected(tmp_path / "b"), custom.expected(tmp_path / "a"), custom.base()]
    for index, expected in enumerate(wanted):
        np.testing.assert_allclose(mixed[index], expected[index], atol=3e-6)
    swapped = graph.mixed(["a", "b", None], graph.x)
    assert np.abs(swapped[:2] - mixed[:2]).max() > 0.05
