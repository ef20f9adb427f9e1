"""What the benchmark runs, made when it is first asked for, and kept for the next time."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

from shapes import SHAPES, Shape, make_adapter, make_model

import lora_edge
from lora_edge.bench.players.llama_library import Q4_0, LlamaLibrary
from lora_edge.bundle.bundle import Bundle, load_bundle

ADAPTERS = 8
ON = "a0"


class Made:
    """Bundles and files of one shape.

    Args:
        folder: where they are kept.
        name: of the shape.
        say: called with a line for each that is made.
        dtype: of the checkpoint, where it is not the shape's own.
        layers: how many it has, where they are not the shape's own.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        say: Callable[[str], None],
        dtype: str | None = None,
        layers: int | None = None,
    ) -> None:
        self.name = name if layers is None else f"{name}, {layers} layers"
        shape: Shape = SHAPES[name] if dtype is None else replace(SHAPES[name], dtype=dtype)
        self.shape = shape if layers is None else replace(shape, layers=layers)
        self.share = self.shape.numbers() / shape.numbers()
        kept = [name, dtype or "", "" if layers is None else f"{layers}-layers"]
        self._folder = folder / "-".join(filter(None, kept))
        self._say = say

    def _kept(self, name: str, make: Callable[[Path], object]) -> Path:
        """A folder of ours; one that was not finished is made again."""
        path = self._folder / name
        if not path.exists():
            self._say(f"{self.name}: making {name}")
            started = path.with_name(f"{name}.started")
            shutil.rmtree(started, ignore_errors=True)
            started.unlink(missing_ok=True)
            self._folder.mkdir(parents=True, exist_ok=True)
            make(started)
            started.rename(path)
        return path

    def base(self) -> Path:
        """The checkpoint."""
        return self._kept("base", lambda path: make_model(path, self.shape))

    def adapter(self, index: int) -> Path:
        """A PEFT folder."""
        base = self.base()
        return self._kept(f"a{index}", lambda path: make_adapter(path, base, self.shape, index))

    def bundle(self, precision: str) -> Bundle:
        """The switchable bundle with all adapters, unproved; ``int4 head4``: all in 4 bits,
        ``int4 native``: as ``int4``.
        """
        precision = precision.removesuffix(" native")
        adapters = {f"a{index}": self.adapter(index) for index in range(ADAPTERS)}
        linear, _, head = precision.partition(" ")
        options = {"mode": "switchable", "precision": linear}
        if head:
            options["head_precision"] = "int4"
        made = self._kept(
            f"switchable-{precision.replace(' ', '-')}",
            lambda path: export_unproved(self.base(), adapters, path, **options),
        )
        return load_bundle(made)

    def merged(self) -> Path:
        """The merged bundle in float32, unproved."""
        return self._kept(
            "merged-fp32",
            lambda path: export_unproved(
                self.base(), {ON: self.adapter(0)}, path, mode="merged", precision="fp32"
            ),
        )

    def genai(self, precision: str) -> Path:
        """The folder that onnxruntime-genai's builder makes of the base."""
        linear = precision.partition(" ")[0]
        return self._kept(f"genai-{linear}", lambda path: _build_genai(self.base(), path, linear))

    def gguf(self, precision: str, library: Path) -> tuple[Path, Path]:
        """The base and the first adapter for llama.cpp: float32, or quantized by it to Q4_0."""
        from gguf_files import write_adapter, write_model

        lora = self._kept("a0.gguf", lambda path: write_adapter(self, path))
        whole = self._kept("base-f32.gguf", lambda path: write_model(self, path))
        if precision == "fp32":
            return whole, lora
        quantized = self._kept(
            "base-q4_0.gguf", lambda path: LlamaLibrary(library).quantize(whole, path, Q4_0)
        )
        return quantized, lora

    def openvino(self, precision: str, python: Path) -> Path:
        """The folder that optimum-intel makes of the base.

        int4 is symmetric in groups of 32, as lora-edge's is; the output layer has 8 bits in both.
        """
        return self._kept(
            f"openvino-{precision}",
            lambda path: _build_openvino(self.base(), path, precision, python),
        )

    def base_bytes(self) -> int:
        """Of the checkpoint, in float32."""
        size = sum(file.stat().st_size for file in self.base().glob("*.safetensors"))
        return size * (1 if self.shape.dtype == "float32" else 2)


class _Unproved:
    """What stands for the report of a proof that was not made."""

    passed, failures, exact, reach = True, (), False, None

    def to_data(self) -> dict[str, Any]:
        return {"cases": []}


def export_unproved(base: Path, adapters: dict[str, Path], output: Path, **options: Any) -> None:
    """An export without its proof: random weights have nothing to prove, and nothing is published.

    What a proof costs is measured by rows of its own.
    """
    with patch("lora_edge.parity.validate", lambda *_, **__: _Unproved()):
        lora_edge.export(base, adapters, output=output, **options)


def genai_installed() -> bool:
    """Whether onnxruntime-genai's builder is in this environment."""
    return find_spec("onnxruntime_genai") is not None


def _build_genai(model: Path, output: Path, precision: str) -> None:
    """In a process of its own, with the builder's own choices for the CPU."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model)]
    command += ["-o", str(output), "-p", precision, "-e", "cpu", "-c", str(output / "cache")]
    _run("onnxruntime-genai's builder", command)
    shutil.rmtree(output / "cache", ignore_errors=True)


def _build_openvino(model: Path, output: Path, precision: str, python: Path) -> None:
    command = [str(python.parent / "optimum-cli"), "export", "openvino", "-m", str(model)]
    command += ["--task", "text-generation-with-past", "--weight-format", precision]
    if precision == "int4":
        command += ["--sym", "--group-size", "32", "--ratio", "1.0"]
    _run("optimum-intel", [*command, str(output)])


def _run(name: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
