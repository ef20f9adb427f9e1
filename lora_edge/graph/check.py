"""The last look at a written graph: onnx's own checker."""

from __future__ import annotations

import os

import onnx

from lora_edge.errors import GraphError


def check(path: str | os.PathLike[str]) -> None:
    """Run ``onnx.checker`` on a graph file, by path, so that any size and external data work.

    Raises:
        GraphError: the checker refuses the graph.
    """
    try:
        onnx.checker.check_model(os.fspath(path))
    except onnx.checker.ValidationError as error:
        first_line = str(error).strip().splitlines()[0]
        raise GraphError(
            f"{path} is not a valid ONNX model: {first_line}",
            "This is a fault of lora-edge; please report it with the model's config.json.",
        ) from error
