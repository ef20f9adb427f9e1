"""What every way of capturing gives: graphs in files, and the layers that they are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_edge.base.layer import Layer
from lora_edge.bundle.part import Beginning, Part
from lora_edge.maths.experts import ParameterModule


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
    model_type: str
    parameter_modules: Mapping[str, ParameterModule] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
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
