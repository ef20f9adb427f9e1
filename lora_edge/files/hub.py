"""Folders of the Hugging Face hub, downloaded or found in its cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lora_edge.errors import LoraEdgeError, MissingDependencyError


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Whether a name that is no path here has the form of a hub id, ``ORG/NAME``."""
    text = os.fspath(name)
    return not (Path(text).exists() or text.startswith((".", "/", "~"))) and text.count("/") == 1


def snapshot(name: str, patterns: Sequence[str], what: str, error: type[LoraEdgeError]) -> Path:
    """The folder of a hub id.

    Args:
        name: ``ORG/NAME``.
        patterns: the files that are wanted.
        what: what is looked for, in the error.
        error: what is raised where there is none.

    Raises:
        LoraEdgeError: of type ``error``: the hub has no such id, or cannot be reached.
        MissingDependencyError: ``huggingface_hub`` is not installed.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError as missing:
        raise MissingDependencyError(
            f"{name!r} is not a folder, and hub ids need huggingface_hub",
            "Install it with: pip install 'lora-edge[export]', or give a local folder.",
        ) from missing
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as failed:
        first_line = str(failed).strip().splitlines()[0]
        raise error(
            f"{what} {name!r} is no folder, and no hub id that can be reached: {first_line}",
            "Check the name, your network and HF_TOKEN; or download it and give the folder.",
        ) from failed
