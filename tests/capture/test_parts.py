"""The one way into a capture: which backend, and which graphs come out."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_edge.base.checkpoint import Base
from lora_edge.bundle.part import Part
from lora_edge.capture import BaseGraph, capture
from lora_edge.errors import UnsupportedModelError
from lora_edge.tasks.task import Task


def _graph(folder: Path, *files: str, encoder: str = "") -> BaseGraph:
    names = ("decoder",) if len(files) == 1 else ("encoder", "decoder")
    parts = {
        name: Part(file, "foreign", "optimum", ("input_ids",), "logits", 9, 10)
        for name, file in zip(names, files, strict=True)
    }
    return BaseGraph(folder, parts, {}, (), "", "some", encoder=encoder)


def test_a_decoder_is_one_graph(tmp_path: Path) -> None:
    graph = _graph(tmp_path, "model.onnx")
    assert graph.path() == graph.path("decoder") == tmp_path / "model.onnx"
    assert graph.part_of("encoder.layer") == "decoder"


def test_an_encoder_decoder_is_two(tmp_path: Path) -> None:
    files = ("encoder_model.onnx", "decoder_model.onnx")
    graph = _graph(tmp_path, *files, encoder="model.encoder")
    assert graph.path() == graph.path("encoder") == tmp_path / "encoder_model.onnx"
    assert graph.path("decoder") == tmp_path / "decoder_model.onnx"
    assert graph.part_of("model.encoder.layers.0.fc1") == "encoder"
    assert graph.part_of("model.encoders") == graph.part_of("lm_head") == "decoder"


def test_an_encoder_decoder_is_not_traced(tmp_path: Path) -> None:
    base = Base(tmp_path, "some", {"model_type": "t5"})
    with pytest.raises(UnsupportedModelError, match="an encoder-decoder is two") as caught:
        capture(base, tmp_path, Task("text2text-generation"))
    assert "optimum" in caught.value.hint
