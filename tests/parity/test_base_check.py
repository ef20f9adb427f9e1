"""The base check passes a right capture, and names the case in which a wrong one differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from lora_edge.base.checkpoint import Base, resolve_base
from lora_edge.capture import BaseGraph, capture
from lora_edge.errors import CaptureError
from lora_edge.parity.plan.plan import shortest_window
from tests.support.checks import checked
from tests.support.families import make_base

WINDOW = 16


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A Mistral with a window, its head dimension a multiple of 8 as the fused form needs."""
    return _mistral(tmp_path_factory.mktemp("mistral"), WINDOW)


@pytest.fixture(scope="module")
def unwindowed(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The same weights under a window that is never reached."""
    return _mistral(tmp_path_factory.mktemp("wide"), 4096)


def _mistral(directory: Path, window: int) -> Base:
    sizes = {"initializer_range": 0.2, "sliding_window": window}
    return resolve_base(make_base("mistral", directory, **sizes))


def _captured(base: Base, directory: Path, form: Literal["fused", "portable"]) -> BaseGraph:
    directory.mkdir()
    return capture(base, directory, form=form)


@pytest.mark.parametrize("form", ["fused", "portable"])
def test_a_right_capture_passes(
    windowed: Base, tmp_path: Path, form: Literal["fused", "portable"]
) -> None:
    figures = checked(_captured(windowed, tmp_path / "c", form), windowed)
    assert figures["window"] == WINDOW
    assert figures["window_covered"]
    assert figures["longest_row"] > WINDOW
    assert 0 < figures["floor"] < figures["limit"] <= 3e-4  # by machine
    sides = {"right"} if form == "fused" else {"right", "left"}
    for side in sides:
        assert f"prompt, padded on the {side}" in figures["cases"]
        assert f"decode after padding on the {side}" in figures["cases"]
    assert all(case["logit_error"] <= figures["limit"] for case in figures["cases"].values())


@pytest.mark.parametrize("form", ["fused", "portable"])
def test_a_capture_that_forgot_the_window_is_found(
    windowed: Base, unwindowed: Base, tmp_path: Path, form: Literal["fused", "portable"]
) -> None:
    """Right below the window, wrong beyond it."""
    graph = _captured(unwindowed, tmp_path / "c", form)
    with pytest.raises(CaptureError, match="prompt, padded on the right"):
        checked(graph, windowed)


def test_a_weight_that_is_slightly_off_is_found(windowed: Base, tmp_path: Path) -> None:
    graph = _captured(windowed, tmp_path / "c", "portable")
    model = onnx.load(graph.path())
    off = replace(graph, folder=tmp_path / "off")
    off.folder.mkdir()
    for tensor in model.graph.initializer:
        if tensor.name == "model.layers.1.mlp.down_proj.weight":
            values = numpy_helper.to_array(tensor) * np.float32(1.0001)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, off.path())
    checked(graph, windowed)
    with pytest.raises(CaptureError, match="differs from PyTorch"):
        checked(off, windowed)


def test_which_window_a_config_means() -> None:
    assert shortest_window({}) is None
    assert shortest_window({"sliding_window": None}) is None
    assert shortest_window({"sliding_window": 64, "use_sliding_window": False}) is None
    assert shortest_window({"text_config": {"sliding_window": 512}}) == 512


def test_a_capture_that_cannot_be_run_is_refused_by_name(unwindowed: Base, tmp_path: Path) -> None:
    graph = capture(unwindowed, tmp_path, form="portable")
    model = onnx.load(graph.path(), load_external_data=False)
    view = next(node for node in model.graph.node if node.op_type == "Reshape")
    shape = numpy_helper.from_array(np.array([7, 7], np.int64), "wrong")
    model.graph.initializer.append(shape)
    view.input[1] = "wrong"
    onnx.save(model, graph.path())
    with pytest.raises(CaptureError, match=r"mistral models are refused.*cannot run") as caught:
        checked(graph, unwindowed)
    assert "other form or backend" in caught.value.hint
