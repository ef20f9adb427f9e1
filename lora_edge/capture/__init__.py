"""A base model -> a base graph, and the facts that a runtime needs of it.

Knows PyTorch and transformers; knows nothing of adapters, graph passes or runtimes.
"""

from __future__ import annotations

import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from lora_edge.base.checkpoint import Base
from lora_edge.capture.base_graph import BaseGraph
from lora_edge.errors import MissingDependencyError, UnsupportedModelError
from lora_edge.tasks.task import TEXT, Task

__all__ = ["BaseGraph", "capture"]

_PACKAGES = ("torch", "transformers", "onnx", "optimum", "optimum-onnx")


def capture(
    base: Base,
    directory: Path,
    task: Task = TEXT,
    *,
    form: Literal["fused", "portable"] = "fused",
    backend: Literal["trace", "optimum"] = "trace",
) -> BaseGraph:
    """Capture a base: a decoder with a KV cache, a model without one, or an encoder and a decoder.

    Args:
        base: the model; its head may be missing where the task says so.
        directory: an existing folder; the graphs and their data are written there.
        task: what the model is to do.
        form: of a decoder: ``fused`` or ``portable``, see :mod:`lora_edge.capture.trace`. What has
            no cache is portable, and the optimum backend has a form of its own.
        backend: ``trace``, or ``optimum`` (see :mod:`lora_edge.capture.optimum`), which an
            encoder-decoder needs.

    Raises:
        MissingDependencyError: the extra ``export``, or ``optimum``, is not installed.
        UnsupportedModelError: the architecture is refused.
        BaseModelError: the model cannot be loaded.
        CaptureError: the graph is not what it should be.
    """
    started = time.monotonic()
    try:
        from lora_edge.capture.encoder import trace_encoder
        from lora_edge.capture.optimum import export_seq2seq, export_with_optimum
        from lora_edge.capture.trace import trace
    except ImportError as error:
        raise MissingDependencyError.of_export(error) from error
    ways = {
        ("decoder", "trace"): trace,
        ("decoder", "optimum"): export_with_optimum,
        ("encoder", "trace"): trace_encoder,
        ("encoder", "optimum"): trace_encoder,
        ("encoder-decoder", "optimum"): export_seq2seq,
    }
    way = ways.get((task.driver, backend))
    if way is None:
        raise UnsupportedModelError(
            f"{base.model_type} models are refused by the trace backend: it traces one graph, and "
            "an encoder-decoder is two",
            "Use --backend optimum, in an environment with lora-edge[optimum].",
        )
    found = way(base, directory, task, form)
    packages = _PACKAGES if found.gives.backend == "optimum" else _PACKAGES[:3]
    return replace(
        found,
        versions={package: version(package) for package in packages},
        seconds=time.monotonic() - started,
    )
