"""LoRA on stacked parameters: the maths and the assignment, against PEFT's own wrappers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper

from lora_edge.errors import AdapterError, UnsupportedAdapterError
from lora_edge.maths.experts import (
    ExpertLora,
    ParameterModule,
    assign,
    expert_lora,
    split_level,
    targeted,
)
from lora_edge.names import parse_peft_key

E = 3
Pair = tuple[NDArray[np.float32], NDArray[np.float32]]


class _Experts(torch.nn.Module):
    """Registers ``down`` first, so that neither the alphabet nor the config gives the order."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class _Model(torch.nn.Module):
    def __init__(self, shapes: dict[str, tuple[int, ...]], transposed: bool) -> None:
        super().__init__()
        self.mlp = torch.nn.Module()
        self.mlp.experts = _Experts(shapes, transposed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.mlp.experts(x)
        return result


def _peft(
    shapes: dict[str, tuple[int, ...]], transposed: bool, targets: list[str], **settings: Any
) -> tuple[dict[int, Pair], dict[str, NDArray[Any]], dict[str, float]]:
    """What PEFT saves, by depth, and each parameter's delta and scaling as PEFT computes them."""
    torch.manual_seed(0)
    config = LoraConfig(
        target_modules=[],
        target_parameters=targets,
        init_lora_weights=False,
        lora_alpha=7,
        **{"r": 4, **settings},
    )
    model = get_peft_model(_Model(shapes, transposed), config)
    levels: dict[int, dict[str, NDArray[np.float32]]] = {}
    for key, tensor in get_peft_model_state_dict(model).items():
        parsed = parse_peft_key(key)
        assert parsed is not None
        path, level = split_level(parsed[0])
        assert path == "mlp.experts"
        levels.setdefault(level, {})[parsed[1]] = tensor.detach().numpy()
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    deltas = {w.parameter_name: w.get_delta_weight("default").detach().numpy() for w in wrappers}
    scalings = {w.parameter_name: float(w.scaling["default"]) for w in wrappers}
    return {level: (pair["A"], pair["B"]) for level, pair in levels.items()}, deltas, scalings


def _delta(lora: ExpertLora) -> NDArray[np.float64]:
    count = lora.shape[0] if len(lora.shape) == 3 else 1
    whole = np.stack([lora.delta(expert) for expert in range(count)])
    return whole.reshape(lora.shape)


SHAPES = {"down": (E, 5, 6), "another": (E, 8, 5), "up": (E, 10, 5), "router": (E, 5)}


# PEFT looks for the keys among modules only, says that they are ignored, and follows them.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "targets",
    [
        ["experts.up"],
        ["up", "mlp.experts.down"],
        ["mlp.experts.down", "experts.up"],
        ["router", "up", "down", "another"],
    ],
)
def test_assignment_and_deltas_are_pefts(
    targets: list[str], rslora: bool, transposed: bool
) -> None:
    shapes = dict(SHAPES)
    levels, deltas, scalings = _peft(
        shapes, transposed, targets, use_rslora=rslora, rank_pattern={"up": 3}
    )
    module = ParameterModule(shapes, transposed)
    found = assign("mlp.experts", module, levels, targets)
    assert set(found) == set(deltas)
    assert len(found) == len(targets)
    for name, pair in found.items():
        lora = expert_lora(
            f"mlp.experts.{name}",
            shapes[name],
            pair,
            scalings[name],
            transposed=transposed,
            peft_version="0.21.2",
        )
        assert lora.rank == (3 if name == "up" else 4)
        assert np.abs(deltas[name]).max() > 0.1
        np.testing.assert_allclose(_delta(lora), deltas[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, E])
def test_square_parameters_follow_the_release(count: int, transposed: bool) -> None:
    shape = (count, 6, 6)
    levels, deltas, scalings = _peft({"up": shape}, transposed, ["up"])

    def lora(version: str | None) -> ExpertLora:
        return expert_lora(
            "up", shape, levels[0], scalings["up"], transposed=transposed, peft_version=version
        )

    for version in ("0.19.1", "0.21.2", "1.0"):
        wanted = deltas["up"].reshape(shape)  # PEFT gives one expert two axes
        np.testing.assert_allclose(_delta(lora(version)), wanted, rtol=1e-5, atol=1e-5)
    turned = _delta(lora("0.19.0"))
    if count > 1:  # the control: the other reading of the axes is another delta
        other = np.swapaxes(deltas["up"], 1, 2)
        np.testing.assert_allclose(turned, other, rtol=1e-5, atol=1e-5)
        assert np.abs(turned - deltas["up"]).max() > 0.1


@pytest.mark.parametrize("version", [None, "0.17.1", "0.18.0"])
@pytest.mark.parametrize("shape", [(E, 6, 6), (E, 5, 8)])
def test_before_0_19_in_is_the_middle_axis(version: str | None, shape: tuple[int, ...]) -> None:
    """``ParamWrapper.get_delta_weight`` of peft 0.18: ``einsum("o r e, e r i -> e i o")``."""
    rng = np.random.default_rng(0)
    _, m, n = shape
    a = rng.standard_normal((E * 4, m)).astype(np.float32)
    b = rng.standard_normal((n, 4 * E)).astype(np.float32)
    wanted = 1.5 * torch.einsum(
        "o r e, e r i -> e i o",
        torch.from_numpy(b).reshape(n, -1, E),
        torch.from_numpy(a).reshape(E, -1, m),
    )
    for transposed in (False, True):
        lora = expert_lora("up", shape, (a, b), 1.5, transposed=transposed, peft_version=version)
        np.testing.assert_allclose(_delta(lora), wanted.numpy(), rtol=1e-5, atol=1e-5)
    new = expert_lora("up", shape, (a, b), 1.5, transposed=False, peft_version="0.19.1")
    same = np.allclose(_delta(new), wanted.numpy(), atol=1e-3)
    assert same == (m != n)  # the shapes decide, and only a square one needs the version


@pytest.mark.parametrize("version", ["0.19.0.dev0", "0.18.2.dev0@f6a2", "newest", ""])
def test_square_parameter_of_an_unknown_release_is_refused(version: str) -> None:
    pair = np.ones((E * 2, 6), np.float32), np.ones((6, E * 2), np.float32)
    with pytest.raises(UnsupportedAdapterError, match="square") as caught:
        expert_lora("x.up", (E, 6, 6), pair, 1.0, transposed=False, peft_version=version)
    assert "x.up" in str(caught.value)
    assert caught.value.hint
    oblong = np.ones((E * 2, 5), np.float32), np.ones((6, E * 2), np.float32)
    expert_lora("x.up", (E, 6, 5), oblong, 1.0, transposed=False, peft_version=version)


def test_another_order_than_pefts_is_refused() -> None:
    module = ParameterModule(SHAPES, False)
    levels, _, _ = _peft(dict(SHAPES), False, ["down", "up"])
    swapped = {0: levels[1], 1: levels[0]}
    with pytest.raises(UnsupportedAdapterError, match="another order") as caught:
        assign("mlp.experts", module, swapped, ["down", "up"])
    assert all(word in str(caught.value) for word in ("mlp.experts", "down", "up"))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["up"], "2 nested pairs"),
        (["up", "down", "another"], "names 3"),
        (["gate.up"], "none"),
        (["down", "another"], "do not fit"),
    ],
)
def test_tensors_that_the_config_does_not_explain_are_refused(
    targets: list[str], words: str
) -> None:
    module = ParameterModule(SHAPES, False)
    levels, _, _ = _peft(dict(SHAPES), False, ["down", "up"])
    with pytest.raises(AdapterError, match=words) as caught:
        assign("mlp.experts", module, levels, targets)
    assert "mlp.experts" in str(caught.value)


def test_factors_of_another_shape_are_refused() -> None:
    pair = np.ones((E * 2 + 1, 5), np.float32), np.ones((6, E * 2 + 1), np.float32)
    with pytest.raises(AdapterError, match="do not fit"):
        expert_lora("x.up", (E, 6, 5), pair, 1.0, transposed=False, peft_version="0.21.2")


def test_targets_match_whole_names_only() -> None:
    module = ParameterModule({"up": (E, 5, 6), "gate_up": (E, 5, 6)}, False)
    assert targeted("mlp.experts", module, ["up"]) == ["up"]
    assert targeted("mlp.experts", module, ["perts.up"]) == []
    assert targeted("mlp.experts", module, ["mlp.experts.gate_up", "up"]) == ["up", "gate_up"]
    assert split_level("a.base_layer.base_layer") == ("a", 2)
