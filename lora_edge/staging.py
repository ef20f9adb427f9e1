"""Atomic publishing: a folder or a file is there whole, or as it was before.

Knows files; knows nothing of what is in them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from lora_edge.errors import BundleError
from lora_edge.manifest import MANIFEST_NAME

_PARTIAL, _RETIRED = ".partial", ".old"


@contextlib.contextmanager
def staging(output: Path, *, force: bool = False, marker: str = MANIFEST_NAME) -> Iterator[Path]:
    """A temporary sibling of ``output`` that replaces it when the block ends without an error.

    Whatever happens in the block, nothing half-written is left: on an error the staging folder is
    removed and ``output`` is as it was.

    Args:
        output: the folder to be made.
        force: replace a non-empty ``output``, if it holds a file called ``marker``.
        marker: the file that shows that a folder is of the kind that may be replaced.

    Raises:
        BundleError: ``output`` exists and is not an empty folder, and ``force`` is not set; or it
            is and the folder has no ``marker``.
    """
    _remove_stale(output)
    if output.exists() and not output.is_dir():
        raise BundleError(f"{output} exists and is no folder", "Choose another folder.")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())) and not force:
        raise BundleError(
            f"{output} exists and is not empty",
            "Choose another folder, or pass --force to replace it.",
        )
    if force and output.is_dir() and any(output.iterdir()) and not (output / marker).is_file():
        raise BundleError(
            f"{output} has no {marker}; --force replaces only what lora-edge made",
            "Choose another folder.",
        )
    stage = output.parent / f".{output.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}{_PARTIAL}"
    try:
        stage.mkdir(parents=True)
    except OSError as error:
        raise BundleError(
            f"cannot write to {output.parent}: {error.strerror}", "Choose another folder."
        ) from error
    try:
        yield stage
        if output.exists():
            retired = stage.with_suffix(_RETIRED)
            output.rename(retired)
            try:
                stage.rename(output)
            except BaseException:
                retired.rename(output)
                raise
            shutil.rmtree(retired)
        else:
            stage.rename(output)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _remove_stale(output: Path) -> None:
    """Clear up what processes that were killed outright have left beside ``output``."""
    for suffix in (_RETIRED, _PARTIAL):
        for left in output.parent.glob(f".{output.name}.*{suffix}"):
            owner = left.name.removeprefix(f".{output.name}.").partition("-")[0]
            if not owner.isdigit() or _is_running(int(owner)):
                continue
            if suffix == _RETIRED and not output.exists():
                left.rename(output)  # killed between the two renames: what was there comes back
            else:
                shutil.rmtree(left, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that its readers see the old text or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
