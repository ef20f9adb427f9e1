"""An adapter as a bundle carries it: its PEFT files, without what its base does not read."""

from __future__ import annotations

from pathlib import Path

from lora_edge.adapter.load import Adapter, load_adapter
from lora_edge.bundle.bundle import Bundle
from lora_edge.fit.rename import without_unread
from lora_edge.tasks.task import Task


def carried_adapter(bundle: Bundle, name: str, directory: Path) -> Adapter:
    """The adapter that a switchable bundle was made of.

    Args:
        bundle: the bundle.
        name: the adapter.
        directory: its PEFT directory.

    Raises:
        AdapterError: the directory holds no adapter.
    """
    manifest = bundle.manifest
    task = Task(manifest.task)
    layers = {**manifest.uncovered, **manifest.sites}
    return without_unread(load_adapter(directory, name), layers, task, _unheard)


def _unheard(line: str) -> None:
    """What the export has said already."""
