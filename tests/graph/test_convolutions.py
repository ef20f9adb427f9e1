"""Adapters on convolutions: both modes against PEFT's unmerged forward, and rows mixed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lora_edge
from lora_edge.names import parse_lora_input
from tests.support.custom_operators import (
    Custom,
    Switchable,
    error_and_effect,
    load,
    make_custom_adapter,
)

# PyTorch says how it pads an even kernel unevenly.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even:UserWarning")

LIMIT = 2e-6
"""Of the effect, which is about 1 in every row; a wrong kernel shows as 0.01 or more."""


class Net(nn.Module):
    """Two convolutions with a non-linearity between, a linear layer on what is left."""

    def __init__(self, first: nn.Module, second: nn.Module, features: int) -> None:
        super().__init__()
        self.conv = first
        self.other = second
        self.head = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.other(torch.relu(self.conv(x))))
        found: Tensor = self.head(x.flatten(1))
        return found


class Row(NamedTuple):
    """A net and what PEFT is asked for.

    Attributes:
        net: makes it.
        size: of its input without the batch.
        settings: fields of ``LoraConfig``.
        feature: the part of the graph inputs that carries what is tested.
    """

    net: Callable[[], nn.Module]
    size: tuple[int, ...]
    settings: dict[str, Any]
    feature: str = "B"


def _net1(**settings: Any) -> Callable[[], nn.Module]:
    length = {1: 9, 2: 5}[settings.get("stride", 1)]
    return lambda: Net(
        nn.Conv1d(4, 6, 3, padding=1, **settings), nn.Conv1d(6, 5, 2), 5 * (length - 1)
    )


def _net2(**settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        first = nn.Conv2d(4, 8, (3, 2), **settings)
        size = first(torch.zeros(1, 4, 7, 6)).shape[2:]
        features = 5 * (size[0] - 1) * size[1]
        return Net(first, nn.Conv2d(8, 5, (2, 1), bias=False), features)

    return make


def _net3(**settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        first = nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 0), **settings)
        size = first(torch.zeros(1, 2, 3, 4, 5)).shape[2:]
        return Net(first, nn.Conv3d(4, 3, 1), 3 * int(np.prod(size)))

    return make


_ONE, _TWO, _THREE = (4, 9), (4, 7, 6), (2, 3, 4, 5)
_BOTH = {"target_modules": ["conv", "other"]}
_CONV = {"target_modules": ["conv"]}

ROWS: dict[str, Row] = {
    "conv1d": Row(_net1(), _ONE, _BOTH),
    "conv1d-stride": Row(_net1(stride=2), _ONE, _BOTH),
    "conv1d-groups": Row(_net1(groups=2), _ONE, _BOTH),
    "conv1d-dora": Row(_net1(), _ONE, {**_BOTH, "use_dora": True}, "G"),
    "conv1d-rslora": Row(_net1(bias=False), _ONE, {**_BOTH, "use_rslora": True}),
    "conv1d-lora-bias": Row(_net1(), _ONE, {**_CONV, "lora_bias": True}, "bias"),
    "conv2d": Row(_net2(), _TWO, _BOTH),
    "conv2d-stride-padding": Row(_net2(stride=(2, 1), padding=(1, 2)), _TWO, _BOTH),
    "conv2d-same": Row(_net2(padding="same"), _TWO, _BOTH),
    "conv2d-valid": Row(_net2(padding="valid", padding_mode="reflect"), _TWO, _BOTH),
    "conv2d-groups": Row(_net2(groups=2, padding=1), _TWO, _BOTH),
    "conv2d-depthwise": Row(_net2(groups=4, stride=2), _TWO, _BOTH),
    "conv2d-no-bias": Row(_net2(bias=False), _TWO, _BOTH),
    "conv2d-dora": Row(_net2(padding=1), _TWO, {**_BOTH, "use_dora": True}, "G"),
    "conv2d-dora-no-bias": Row(_net2(bias=False), _TWO, {**_BOTH, "use_dora": True}, "G"),
    "conv2d-dora-groups": Row(_net2(groups=2), _TWO, {**_BOTH, "use_dora": True}, "G"),
    "conv2d-dora-depthwise": Row(
        _net2(groups=4, bias=False), _TWO, {**_BOTH, "use_dora": True, "use_rslora": True}, "G"
    ),
    "conv2d-lora-bias": Row(_net2(), _TWO, {**_BOTH, "lora_bias": True}, "bias"),
    "conv2d-lora-bias-groups": Row(
        _net2(groups=2, bias=False), _TWO, {**_CONV, "lora_bias": True}, "bias"
    ),
    "conv2d-bias-all": Row(_net2(), _TWO, {**_CONV, "bias": "all"}, "bias"),
    "conv2d-bias-lora-only": Row(
        _net2(groups=2), _TWO, {**_CONV, "bias": "lora_only", "use_dora": True}, "bias"
    ),
    "conv2d-saved": Row(_net2(), _TWO, {"target_modules": ["head"], "modules_to_save": ["conv"]}),
    "conv2d-saved-groups": Row(
        _net2(groups=4, padding=1), _TWO, {"target_modules": ["other"], "modules_to_save": ["conv"]}
    ),
    "conv2d-saved-dilated": Row(
        _net2(dilation=2), _TWO, {"target_modules": ["other"], "modules_to_save": ["conv"]}
    ),
    "conv2d-saved-reflecting": Row(
        _net2(padding=1, padding_mode="reflect"),
        _TWO,
        {"target_modules": ["other"], "modules_to_save": ["conv"]},
    ),
    "conv2d-saved-circular": Row(
        _net2(padding=1, padding_mode="circular"),
        _TWO,
        {"target_modules": ["other"], "modules_to_save": ["conv"]},
    ),
    "conv2d-patterns": Row(
        _net2(),
        _TWO,
        {
            "target_modules": ["conv", "other", "head"],
            "rank_pattern": {"conv": 2, "head": 1},
            "alpha_pattern": {"^other": 5},
        },
    ),
    "conv3d": Row(_net3(), _THREE, _BOTH),
    "conv3d-groups": Row(_net3(groups=2, stride=(1, 2, 1)), _THREE, _BOTH),
    "conv3d-dora": Row(_net3(), _THREE, {**_BOTH, "use_dora": True}, "G"),
    "conv3d-lora-bias": Row(_net3(bias=False), _THREE, {**_CONV, "lora_bias": True}, "bias"),
}


def make(row: Row, directory: Path) -> Custom:
    torch.manual_seed(0)
    model = row.net().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return Custom(model, torch.randn(3, *row.size), directory)


@pytest.mark.parametrize("name", ROWS)
def test_convolutions(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    custom = make(row, tmp_path / "graph")
    path = make_custom_adapter(custom.model, tmp_path / "adapter", row.settings)
    adapter, base, expected = load(path), custom.base(), custom.expected(path)
    graph = custom.switchable({"a": custom.changes(adapter)})
    feeds = graph.tensors("a")

    error, effect = error_and_effect(graph.run(feeds), expected, base)
    assert effect > 0.05
    assert error <= LIMIT * max(effect, 1)
    error, _ = error_and_effect(custom.merged(adapter), expected, base)
    assert error <= LIMIT * max(effect, 1)
    np.testing.assert_allclose(graph.off(), base, atol=1e-6)

    parts = {key: parsed.part for key in feeds if (parsed := parse_lora_input(key)) is not None}
    assert row.feature in parts.values()
    dropped = {key: x * (parts.get(key) != row.feature) for key, x in feeds.items()}
    error, _ = error_and_effect(graph.run(dropped), expected, base)
    assert error > 1e-3
    halved = {key: x * np.float32(0.5 if key.endswith(".gate") else 1) for key, x in feeds.items()}
    error, _ = error_and_effect(graph.run(halved), expected, base)
    assert error > 1e-3


MIXED: dict[str, tuple[Row, list[dict[str, Any]]]] = {
    "conv1d": (
        ROWS["conv1d-stride"],
        [{**_BOTH, "r": 2}, {**_BOTH, "r": 3, "lora_bias": True}],
    ),
    "conv2d-groups": (
        ROWS["conv2d-groups"],
        [{**_BOTH, "r": 2, "use_dora": True}, {"target_modules": ["other", "head"], "r": 5}],
    ),
    "conv3d": (
        ROWS["conv3d"],
        [{**_CONV, "r": 2}, {"target_modules": ["other"], "modules_to_save": ["conv"], "r": 3}],
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_each_row_of_a_mixed_batch_is_that_row_alone(name: str, tmp_path: Path) -> None:
    row, several = MIXED[name]
    custom = make(row, tmp_path / "graph")
    changes = {}
    for index, settings in enumerate(several):
        path = make_custom_adapter(custom.model, tmp_path / f"a{index}", settings, seed=index)
        changes[f"a{index}"] = custom.changes(load(path))
    graph = custom.switchable(changes)
    states = ["a1", None, "a0"]
    mixed = graph.mixed(states, graph.x)
    for index, state in enumerate(states):
        alone = graph.off() if state is None else graph.run(graph.tensors(state))
        np.testing.assert_allclose(mixed[index], alone[index], atol=2e-6)
        expected = custom.base() if state is None else custom.expected(tmp_path / state)
        np.testing.assert_allclose(mixed[index], expected[index], atol=2e-6)
    swapped = graph.mixed(["a0", None, "a1"], graph.x)
    assert np.abs(swapped[[0, 2]] - mixed[[0, 2]]).max() > 1e-2


def _refused(settings: dict[str, Any], tmp_path: Path, net: dict[str, Any]) -> str:
    custom = make(Row(_net2(**net), _TWO, settings), tmp_path / "graph")
    adapter = load(make_custom_adapter(custom.model, tmp_path / "adapter", settings))
    messages = set()
    for run in (custom.changes, custom.merged):
        with pytest.raises(lora_edge.UnsupportedAdapterError) as caught:
            run(adapter)
        assert "modules_to_save" in caught.value.hint
        messages.add(str(caught.value))
    (message,) = messages
    return message


@pytest.mark.parametrize("padding", [0, "same"])
def test_dilated_convolutions_are_refused_by_name(padding: Any, tmp_path: Path) -> None:
    """PEFT's A is not dilated: its forward fails, or with "same" it looks elsewhere than W."""
    message = _refused(_CONV, tmp_path, {"dilation": 2, "padding": padding})
    assert "conv is a dilated convolution ((2, 2))" in message


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_with_anything_but_zeros_is_refused_by_name(mode: str, tmp_path: Path) -> None:
    message = _refused(_CONV, tmp_path, {"padding": 1, "padding_mode": mode})
    assert f"conv is a convolution with padding_mode {mode!r}" in message


def test_a_dilation_of_a_kernel_of_one_is_none(tmp_path: Path) -> None:
    def pointwise() -> nn.Module:
        return Net(nn.Conv2d(4, 6, 1, dilation=3), nn.Conv2d(6, 5, 1), 5 * 42)

    custom = make(Row(pointwise, _TWO, _CONV), tmp_path / "c")
    path = make_custom_adapter(custom.model, tmp_path / "d", _CONV)
    graph: Switchable = custom.switchable({"a": custom.changes(load(path))})
    got = graph.run(graph.tensors("a"))
    np.testing.assert_allclose(got, custom.expected(path), atol=2e-6)
    assert np.abs(got - custom.base()).max() > 0.01
