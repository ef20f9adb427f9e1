"""What a merged bundle's adapter makes of its base's parameters, computed again from its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora_edge.adapter.load import load_adapter
from lora_edge.base.layers import Layers
from lora_edge.fit.changes import ParameterChange, parameter_changes
from lora_edge.fit.rename import without_unread
from lora_edge.tasks.task import Task
from lora_edge.types import silent


def merged_changes(
    built: Layers, task: Task, name: str, directory: Path
) -> Mapping[str, ParameterChange]:
    """Parameter path -> change.

    Args:
        built: the base's layers, of :func:`~lora_edge.base.layers.built_layers`.
        task: what the base does.
        name: the adapter.
        directory: its PEFT directory.

    Raises:
        AdapterError: the directory holds no adapter.
    """
    adapter = without_unread(load_adapter(directory, name), built.modules, task, silent)
    return parameter_changes(
        adapter.settled(built.modules), built.modules, built.tied, built.parameter_modules
    )
