"""PyTorch's answers around the graph, kept in the bundle: one small JSON file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lora_edge.bundle.bundle import Bundle
from lora_edge.errors import BundleError
from lora_edge.files.json import read_object
from lora_edge.parity.around.asked import Answers
from lora_edge.parity.record.golden import FOLDER

_STEM = "around-"


def is_around(relative: str) -> bool:
    """Whether a file of a bundle is one of these."""
    return relative.startswith(f"{FOLDER}/{_STEM}") and relative.endswith(".json")


def load_around(bundle: Bundle) -> Answers | None:
    """What was recorded; ``None``: nothing was, as in bundles of earlier releases.

    Raises:
        BundleError: the file is not one.
    """
    names = [name for name in bundle.manifest.files if is_around(name)]
    if not names:
        return None
    return read_object(bundle.directory / names[0], BundleError, "Export the bundle again.")


def save_around(directory: Path, answers: Answers) -> str:
    """Write the answers below a bundle's folder and return the file's relative path."""
    text = json.dumps(answers, indent=None, sort_keys=True, ensure_ascii=True) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    relative = f"{FOLDER}/{_STEM}{digest}.json"
    (directory / FOLDER).mkdir(exist_ok=True)
    (directory / relative).write_text(text, encoding="utf-8")
    return relative
