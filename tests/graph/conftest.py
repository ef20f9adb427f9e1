"""A small graph, saved as the package does and run on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort
import pytest

from tests.support.small_graphs import Array, Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Save a graph as the package does, run it, and return its outputs."""
    from lora_edge.graph import check, save_with_data

    def go(model: ir.Model, x: Array, feeds: Mapping[str, Array] | None = None) -> list[Array]:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        save_with_data(model, folder / "model.onnx")
        check(folder / "model.onnx")
        session = ort.InferenceSession(
            str(folder / "model.onnx"), providers=["CPUExecutionProvider"]
        )
        found: list[Array] = session.run(None, {"x": x, **(feeds or {})})
        return found

    return go
