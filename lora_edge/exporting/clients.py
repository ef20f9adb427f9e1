"""The files of a bundle that other clients read, beside the graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_edge.base.checkpoint import Base
from lora_edge.bundle.clients import GENAI_FILE, client_config, genai_config
from lora_edge.bundle.manifest import Manifest
from lora_edge.errors import BaseModelError
from lora_edge.files.json import read_object


def write_client_files(base: Base, stage: Path, manifest: Manifest, architecture: str) -> None:
    """Write ``config.json``, and ``genai_config.json`` where onnxruntime-genai runs the graph.

    Args:
        base: the base.
        stage: the bundle's folder.
        manifest: of the bundle.
        architecture: transformers' class of the model.

    Raises:
        BaseModelError: the base's ``generation_config.json`` is damaged.
    """
    _write(stage / "config.json", client_config(base.config, manifest, architecture))
    file = base.directory / "generation_config.json"
    generation = (
        read_object(file, BaseModelError, "Download it again.", nonfinite=True)
        if file.is_file()
        else {}
    )
    genai = genai_config(manifest, base.config, generation)
    if genai is not None:
        _write(stage / GENAI_FILE, genai)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
