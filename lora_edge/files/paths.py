"""Paths that a file names: relative, without ``..``, and inside their folder when followed.

Knows folders and links; knows nothing of what is in them.
"""

from __future__ import annotations

from pathlib import Path

from lora_edge.errors import LoraEdgeError
from lora_edge.files.schema import INSIDE


def path_inside(
    directory: Path, relative: object, what: str, error: type[LoraEdgeError], hint: str
) -> Path:
    """The path that a file of a folder names.

    The file need not exist. Links are followed, those of folders above it too: what they lead to
    has to be inside as well. The one exception is the cache of the Hugging Face hub, whose
    snapshots are links to the blobs beside them.

    Args:
        directory: the folder.
        relative: what was named, with ``/``.
        what: who named it, for an error: ``manifest: adapters.x.file``.
        error: what is raised where it is refused.
        hint: of that error: what to do.

    Raises:
        LoraEdgeError: of type ``error``: it is no relative path, leads out, or cannot be followed.
    """
    if not isinstance(relative, str) or not INSIDE.holds(relative):
        raise error(f"{what} is {relative!r}, expected {INSIDE.expected}", hint)
    path = directory / relative
    try:
        root, target = directory.resolve(), path.resolve()
    except (OSError, RuntimeError) as fault:  # RuntimeError: a loop of links, before Python 3.13
        raise error(f"{what} is {relative!r}, which cannot be followed: {fault}", hint) from fault
    if not any(target.is_relative_to(place) for place in (root, *_blobs(root))):
        raise error(f"{what} is {relative!r}, which a link leads out of {directory}", hint)
    return path


def _blobs(root: Path) -> tuple[Path, ...]:
    """The blobs of a hub cache's snapshot, ``models--ORG--NAME/snapshots/REVISION``."""
    for above in root.parents:
        if above.name == "snapshots" and "--" in above.parent.name:
            return (above.parent / "blobs",)
    return ()
