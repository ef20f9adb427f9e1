"""A base model -> a base graph with a KV cache, and the facts that a runtime needs of it.

Knows PyTorch and transformers; knows nothing of adapters, graph passes or runtimes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from lora_edge.base import Base
from lora_edge.bundle import GraphSpec, SiteEntry
from lora_edge.errors import MissingDependencyError
from lora_edge.experts import ParameterModule

__all__ = ["BaseGraph", "capture"]


@dataclass(frozen=True)
class BaseGraph:
    """A captured base model.

    Attributes:
        path: the ONNX file; its weights are in ``model.onnx_data`` beside it.
        spec: what a runtime must know of the graph.
        linears: module path -> sizes, of every linear layer, the head included.
        tied: the head shares the embedding's weight.
        head: module path of the head.
        parameter_modules: module path -> parameters that an adapter may target directly: experts
            and routers of the trace backend. The graph has them as initializers of their paths.
        model_type: ``model_type`` of the config.
        versions: versions of the packages that made the graph.
        seconds: how long the capture took.
    """

    path: Path
    spec: GraphSpec
    linears: Mapping[str, SiteEntry]
    tied: bool
    head: str
    parameter_modules: Mapping[str, ParameterModule]
    model_type: str
    versions: Mapping[str, str]
    seconds: float


def capture(
    base: Base,
    directory: Path,
    *,
    form: Literal["fused", "portable"] = "fused",
    backend: Literal["trace", "optimum"] = "trace",
) -> BaseGraph:
    """Capture a decoder as an ONNX graph with a KV cache.

    Args:
        base: the model.
        directory: an existing folder; ``model.onnx`` and ``model.onnx_data`` are written there.
        form: ``fused`` or ``portable``, see :mod:`lora_edge.capture.trace`; the optimum backend
            has one form of its own and ignores this.
        backend: ``trace``, or ``optimum`` (see :mod:`lora_edge.capture.optimum`).

    Raises:
        MissingDependencyError: the extra ``export``, or ``optimum``, is not installed.
        UnsupportedModelError: the architecture is refused.
        BaseModelError: the model cannot be loaded.
        CaptureError: the graph is not what it should be.
    """
    started = time.monotonic()
    try:
        from lora_edge.capture.optimum import export_with_optimum
        from lora_edge.capture.trace import trace
    except ImportError as error:
        raise MissingDependencyError(
            f"exporting needs {error.name}, which is not installed",
            "Install it with: pip install 'lora-edge[export]'",
        ) from error
    packages = ["torch", "transformers", "onnx"]
    parameter_modules: Mapping[str, ParameterModule] = {}
    if backend == "optimum":
        path, spec, linears, tied, head = export_with_optimum(base, directory)
        packages += ["optimum", "optimum-onnx"]
    else:
        path, spec, linears, tied, head, parameter_modules = trace(base, directory, form)
    return BaseGraph(
        path=path,
        spec=spec,
        linears={name: SiteEntry(*sizes) for name, sizes in linears.items()},
        tied=tied,
        head=head,
        parameter_modules=parameter_modules,
        model_type=base.model_type,
        versions={package: version(package) for package in packages},
        seconds=time.monotonic() - started,
    )
