"""Where an adapter is: a PEFT directory, a hub id, or a folder of MLX-LM -> a PEFT directory."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from lora_edge.adapter.mlx import is_mlx, mlx_as_peft
from lora_edge.errors import AdapterError
from lora_edge.files.hub import is_hub_id, snapshot

_FILES = (
    "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors", "*.json", "*.jinja",
    "*.txt", "*.model",
)  # fmt: skip


@contextlib.contextmanager
def peft_directory(adapter: str | os.PathLike[str]) -> Iterator[Path]:
    """The PEFT directory of an adapter; one that is made here exists inside the block only.

    Args:
        adapter: a folder that PEFT or MLX-LM wrote, or a hub id of one.

    Raises:
        AdapterError: a hub id that cannot be reached; a folder of MLX-LM that cannot be converted.
        MissingDependencyError: a hub id is given and ``huggingface_hub`` is not installed.
    """
    folder = Path(adapter)
    if is_hub_id(adapter):
        folder = snapshot(os.fspath(adapter), _FILES, "adapter", AdapterError)
    if not is_mlx(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="lora-edge-") as scratch:
        mlx_as_peft(folder, Path(scratch))
        yield Path(scratch)


@contextlib.contextmanager
def peft_directories(
    adapters: Mapping[str, str | os.PathLike[str]],
) -> Iterator[dict[str, str | os.PathLike[str]]]:
    """Name -> PEFT directory, of each adapter; see :func:`peft_directory`."""
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(peft_directory(adapter)) for name, adapter in adapters.items()
        }
