"""A base model -> a base graph, and the facts that a runtime needs of it.

Knows PyTorch and transformers; knows nothing of adapters, graph passes or runtimes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from lora_edge.base.checkpoint import Base
from lora_edge.base.layer import Layer
from lora_edge.bundle.part import Beginning, Part
from lora_edge.errors import MissingDependencyError, UnsupportedModelError
from lora_edge.maths.experts import ParameterModule
from lora_edge.tasks.task import TEXT, Task

__all__ = ["BaseGraph", "capture"]

_TRACE_PACKAGES: tuple[str, ...] = ("torch", "transformers", "onnx")
_OPTIMUM_PACKAGES = (*_TRACE_PACKAGES, "optimum", "optimum-onnx")


@dataclass(frozen=True)
class BaseGraph:
    """A captured base model.

    Attributes:
        folder: where the ONNX files are; their weights are in ``<file>_data`` beside them.
        parts: name -> what a runtime must know of the graph.
        modules: module path -> sizes and kind, of every layer that an adapter may change.
        tied: module paths of the embedding and of the head that shares its weight, or ().
        head: module path of the head, of its last layer where it has several; empty: none.
        parameter_modules: module path -> parameters that an adapter may target directly: experts
            and routers of the trace backend. The graph has them as initializers of their paths.
        model_type: ``model_type`` of the config.
        versions: versions of the packages that made the graph.
        seconds: how long the capture took.
        beginning: what an encoder-decoder's answer begins with.
        encoder: module path of the encoder, where the decoder is another part.
    """

    folder: Path
    parts: Mapping[str, Part]
    modules: Mapping[str, Layer]
    tied: tuple[str, ...]
    head: str
    parameter_modules: Mapping[str, ParameterModule]
    model_type: str
    versions: Mapping[str, str]
    seconds: float
    beginning: Beginning | None = None
    encoder: str = ""

    @property
    def reads(self) -> Part:
        """The part that reads the inputs."""
        return next(iter(self.parts.values()))

    @property
    def gives(self) -> Part:
        """The part that gives the outputs."""
        return list(self.parts.values())[-1]

    def path(self, part: str = "") -> Path:
        """The ONNX file of a part; by default of the one that reads the inputs."""
        return self.folder / (self.parts[part] if part else self.reads).file

    def part_of(self, module: str) -> str:
        """Name of the part that a module is in."""
        if len(self.parts) == 1:
            return next(iter(self.parts))
        return "encoder" if module.startswith(f"{self.encoder}.") else "decoder"


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
    if task.seq2seq and backend != "optimum":
        raise UnsupportedModelError(
            f"{base.model_type} models are refused by the trace backend: it traces one graph, and "
            "an encoder-decoder is two",
            "Use --backend optimum, in an environment with lora-edge[optimum].",
        )
    started = time.monotonic()
    try:
        from lora_edge.capture.encoder import trace_encoder
        from lora_edge.capture.optimum import export_seq2seq, export_with_optimum
        from lora_edge.capture.trace import trace
    except ImportError as error:
        raise MissingDependencyError.of_export(error) from error
    tied: tuple[str, ...] = ()
    parameter_modules: Mapping[str, ParameterModule] = {}
    packages = _OPTIMUM_PACKAGES if backend == "optimum" else _TRACE_PACKAGES
    beginning, encoder = None, ""
    if task.driver == "encoder-decoder":
        parts, encoder, beginning, modules, tied, head = export_seq2seq(base, directory, task)
    elif task.driver == "encoder":
        part, modules, head = trace_encoder(base, directory, task)
        packages = _TRACE_PACKAGES
        parts = {"encoder": part}
    else:
        if backend == "optimum":
            part, modules, tied, head = export_with_optimum(base, directory)
        else:
            part, modules, tied, head, parameter_modules = trace(base, directory, form)
        parts = {"decoder": part}
    return BaseGraph(
        folder=directory,
        parts=parts,
        modules=modules,
        tied=tied,
        head=head,
        parameter_modules=parameter_modules,
        model_type=base.model_type,
        versions={package: version(package) for package in packages},
        seconds=time.monotonic() - started,
        beginning=beginning,
        encoder=encoder,
    )
