"""A base model -> a base graph, and the facts that a runtime needs of it.

Knows PyTorch and transformers; knows nothing of adapters, graph passes or runtimes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Generic, Literal, TypeVar

from lora_edge.base import Base
from lora_edge.errors import MissingDependencyError
from lora_edge.experts import ParameterModule
from lora_edge.manifest import EncoderSpec, GraphSpec, Seq2SeqSpec, SiteEntry
from lora_edge.tasks import Task

__all__ = ["BaseGraph", "capture", "capture_seq2seq", "capture_task"]

Spec = TypeVar("Spec", GraphSpec, EncoderSpec, Seq2SeqSpec)


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
    modules: Mapping[str, SiteEntry]
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
        raise _missing(error) from error
    packages = ["torch", "transformers", "onnx"]
    parameter_modules: Mapping[str, ParameterModule] = {}
    if backend == "optimum":
        path, spec, modules, tied, head = export_with_optimum(base, directory)
        packages += ["optimum", "optimum-onnx"]
    else:
        path, spec, modules, tied, head, parameter_modules = trace(base, directory, form)
    return BaseGraph(
        path=path,
        spec=spec,
        modules=modules,
        tied=tied,
        head=head,
        parameter_modules=parameter_modules,
        model_type=base.model_type,
        versions={package: version(package) for package in packages},
        seconds=time.monotonic() - started,
    )


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
        raise _missing(error) from error
    path, spec, modules, head = trace_encoder(base, directory, task)
    return BaseGraph(
        path=path,
        spec=spec,
        modules=modules,
        tied=(),
        head=head,
        parameter_modules={},
        model_type=base.model_type,
        versions={package: version(package) for package in ("torch", "transformers", "onnx")},
        seconds=time.monotonic() - started,
    )


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
        raise _missing(error) from error
    path, spec, modules, tied, head = export_seq2seq(base, directory, task)
    packages = ("torch", "transformers", "onnx", "optimum", "optimum-onnx")
    return BaseGraph(
        path=path,
        spec=spec,
        modules=modules,
        tied=tied,
        head=head,
        parameter_modules={},
        model_type=base.model_type,
        versions={package: version(package) for package in packages},
        seconds=time.monotonic() - started,
    )


def _missing(error: ImportError) -> MissingDependencyError:
    return MissingDependencyError(
        f"exporting needs {error.name}, which is not installed",
        "Install it with: pip install 'lora-edge[export]'",
    )
