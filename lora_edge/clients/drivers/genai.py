"""Bundles in onnxruntime-genai: its own loop, cache, tokenizer and adapters.

``python genai.py``. One adapter at a time, at weight 1, and one row.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og


class Genai:
    """A bundle's folder as genai reads it."""

    def open(self, bundle: str, graph: str) -> Mapping[str, Any]:
        folder = Path(bundle)
        self.manifest = json.loads((folder / "lora_edge.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        self.folder = folder
        half = self.manifest["precision"] == "fp16" and graph == config_graph(config)
        self.file = "half" if half else "file"
        if graph != config_graph(config):  # the graph in floats beside the one that ships
            self.folder = self.other(folder, config, graph)
        self.model = og.Model(str(self.folder))
        self.adapters = og.Adapters(self.model)
        self.tokenizer = og.Tokenizer(self.model)
        if tokens := special_tokens(folder):
            self.tokenizer.update_options(add_special_tokens=tokens)
        self.bundle = folder
        self.loaded: set[str] = set()
        self.generators: dict[int, Any] = {}
        return {"about": f"onnxruntime-genai {og.__version__}", "can": ["encode"]}

    def other(self, folder: Path, config: Mapping[str, Any], graph: str) -> Path:
        """The same folder with another graph in its config."""
        self.copy = tempfile.TemporaryDirectory(prefix="lora-edge-genai-")
        copy = Path(self.copy.name)
        for file in folder.iterdir():
            if file.is_file() and file.name != "genai_config.json":
                shutil.copy(file, copy / file.name)
        (copy / "onnx").symlink_to(folder.resolve() / "onnx")
        model = {**config["model"], "decoder": {**config["model"]["decoder"], "filename": graph}}
        (copy / "genai_config.json").write_text(json.dumps({**config, "model": model}))
        return copy

    def start(self, states: Sequence[Mapping[str, float]], sequence: int) -> Mapping[str, Any]:
        (state,) = states
        length = self.manifest["parts"]["decoder"]["max_length"]
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(batch_size=1, do_sample=False, max_length=length or 4096)
        generator = og.Generator(self.model, parameters)
        if self.manifest["mode"] == "switchable":
            (name,) = state or ("none",)
            if name not in self.loaded:
                file = self.manifest["adapters"][name][self.file]
                self.adapters.load(str(self.bundle / file), name)
                self.loaded.add(name)
            generator.set_active_adapter(self.adapters, name)
        self.generators[sequence] = generator
        return {}

    def extend(
        self, rows: Sequence[Sequence[int]], every: bool, sequence: int
    ) -> Mapping[str, Any]:
        generator = self.generators[sequence]
        found = []
        # It gives the logits of the last token alone.
        for token in [[token] for token in rows[0]] if every else [rows[0]]:
            generator.append_tokens(np.array([token], np.int32))
            found.append(np.asarray(generator.get_logits(), np.float32).reshape(-1))
        return {"arrays": [np.stack(found)]}

    def encode(self, text: str, adapter: str | None) -> Mapping[str, Any]:
        if adapter is not None:
            raise ValueError("genai has one tokenizer for all adapters")
        return {"ids": [int(x) for x in self.tokenizer.encode(text)]}


def config_graph(config: Mapping[str, Any]) -> str:
    """The graph that a ``genai_config.json`` names."""
    return str(config["model"]["decoder"]["filename"])


def special_tokens(folder: Path) -> str:
    """Whether the bundle's tokenizer adds special tokens, as genai's option has it."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return ""
    processor = json.loads(file.read_text(encoding="utf-8")).get("post_processor")
    return "true" if processor else ""


if __name__ == "__main__":
    from talk import talk  # beside this file, which is a program of its own

    genai = Genai()
    talk({order: getattr(genai, order) for order in ("open", "start", "extend", "encode")})
