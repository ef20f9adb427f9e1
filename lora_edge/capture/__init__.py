"""A base model -> a base graph, and the facts that a runtime needs of it.

Knows PyTorch and transformers; knows nothing of adapters, graph passes or runtimes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Generic, Literal

from lora_edge.base.checkpoint import Base
from lora_edge.base.layer import Layer
from lora_edge.bundle.manifest import EncoderSpec, GraphSpec, Seq2SeqSpec, Spec
from lora_edge.errors import MissingDependencyError
from lora_edge.maths.experts import ParameterModule
from lora_edge.tasks.task import Task

__all__ = [
    "BaseGraph",
    "capture",
    "capture_seq2seq",
    "capture_task",
]

_TRACE_PACKAGES: tuple[str, ...] = ("torch", "transformers", "onnx")
_OPTIMUM_PACKAGES = (*_TRACE_PACKAGES, "optimum", "optimum-onnx")


@dataclass(frozen=True)
class BaseGraph(Generic[Spec]):
    """A captured base model.

    Attributes:
        path: the ONNX file; its weights are in ``model.onnx_data`` beside it. Of an
            encoder-decoder the encoder, ``encoder_model.onnx``, beside ``decoder_model.onnx``.
        spec: what a runtime must know of the graph.
        modules: module path -> sizes and kind, of every layer that an adapter may change.
        tied: module paths of the embedding and of the head that shares its weight, or ().
        head: module path of the head, of its last layer where it has several; empty: none.
        parameter_modules: module path -> parameters that an adapter may target directly: experts
            and routers of the trace backend. The graph has them as initializers of their paths.
        model_type: ``model_type`` of the config.
        versions: versions of the packages that made the graph.
        seconds: how long the capture took.
    """

    path: Path
    spec: Spec
    modules: Mapping[str, Layer]
    tied: tuple[str, ...]
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
) -> BaseGraph[GraphSpec]:
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
        raise MissingDependencyError.of_export(error) from error
    packages = _TRACE_PACKAGES
    parameter_modules: Mapping[str, ParameterModule] = {}
    if backend == "optimum":
        path, spec, modules, tied, head = export_with_optimum(base, directory)
        packages = _OPTIMUM_PACKAGES
    else:
        path, spec, modules, tied, head, parameter_modules = trace(base, directory, form)
    return _base_graph(base, path, spec, modules, packages, started, tied, head, parameter_modules)


def capture_task(base: Base, directory: Path, task: Task) -> BaseGraph[EncoderSpec]:
    """Capture a model without a cache, in the portable form.

    Args:
        base: the model; its head may be missing where the task says so.
        directory: an existing folder; ``model.onnx`` and ``model.onnx_data`` are written there.
        task: what the model is to do.

    Raises:
        MissingDependencyError, UnsupportedModelError, BaseModelError, CaptureError: as
            :func:`capture`.
    """
    started = time.monotonic()
    try:
        from lora_edge.capture.encoder import trace_encoder
    except ImportError as error:
        raise MissingDependencyError.of_export(error) from error
    path, spec, modules, head = trace_encoder(base, directory, task)
    return _base_graph(base, path, spec, modules, _TRACE_PACKAGES, started, head=head)


def capture_seq2seq(base: Base, directory: Path, task: Task) -> BaseGraph[Seq2SeqSpec]:
    """Capture an encoder and a decoder without a cache, with the optimum backend.

    Args:
        base: the model.
        directory: an existing folder; both graphs and their data are written there.
        task: what the model is to do.

    Raises:
        MissingDependencyError, UnsupportedModelError, BaseModelError, CaptureError: as
            :func:`capture`.
    """
    started = time.monotonic()
    try:
        from lora_edge.capture.optimum import export_seq2seq
    except ImportError as error:
        raise MissingDependencyError.of_export(error) from error
    path, spec, modules, tied, head = export_seq2seq(base, directory, task)
    return _base_graph(base, path, spec, modules, _OPTIMUM_PACKAGES, started, tied, head)


def _base_graph(
    base: Base,
    path: Path,
    spec: Spec,
    modules: Mapping[str, Layer],
    packages: Sequence[str],
    started: float,
    tied: tuple[str, ...] = (),
    head: str = "",
    parameter_modules: Mapping[str, ParameterModule] | None = None,
) -> BaseGraph[Spec]:
    """What was captured since ``started``, by ``time.monotonic``, with these packages."""
    return BaseGraph(
        path=path,
        spec=spec,
        modules=modules,
        tied=tied,
        head=head,
        parameter_modules=parameter_modules or {},
        model_type=base.model_type,
        versions={package: version(package) for package in packages},
        seconds=time.monotonic() - started,
    )
