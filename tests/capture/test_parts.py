"""The one way into a capture: which backend, and which graphs come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_edge.base.checkpoint import Base
from lora_edge.bundle.manifest import GraphSpec, Seq2SeqSpec
from lora_edge.capture import BaseGraph, capture
from lora_edge.errors import UnsupportedModelError
from lora_edge.tasks.task import Task


def _graph(path: Path, spec: Any) -> BaseGraph[Any]:
    return BaseGraph(path, spec, {}, (), "", {}, "some", {}, 0.0)


def test_a_decoder_is_one_graph(tmp_path: Path) -> None:
    spec = GraphSpec("fused", "trace", "right", True, 1, 1, 8, 9, 10)
    graph = _graph(tmp_path / "model.onnx", spec)
    assert dict(graph.parts) == {"model": tmp_path / "model.onnx"}
    assert graph.part_of("encoder.layer") == "model"


def test_an_encoder_decoder_is_two(tmp_path: Path) -> None:
    spec = Seq2SeqSpec("foreign", "optimum", "model.encoder", (), 9, 0, 0, 0, (1,))
    graph = _graph(tmp_path / "encoder_model.onnx", spec)
    assert set(graph.parts) == {"encoder", "decoder"}
    assert graph.parts["decoder"] == tmp_path / "decoder_model.onnx"
    assert graph.part_of("model.encoder.layers.0.fc1") == "encoder"
    assert graph.part_of("model.encoders") == graph.part_of("lm_head") == "decoder"


def test_an_encoder_decoder_is_not_traced(tmp_path: Path) -> None:
    base = Base(tmp_path, "some", {"model_type": "t5"})
    with pytest.raises(UnsupportedModelError, match="an encoder-decoder is two") as caught:
        capture(base, tmp_path, Task("text2text-generation"))
    assert "optimum" in caught.value.hint
