"""Hidden paths of one's own, where what is not whole yet is made.

Each has a lock file, ``NAME.lock``, that its maker holds: what a dead process of this machine left
is removed by the next one, and nothing else ever is.
"""

from __future__ import annotations

import contextlib
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_edge.errors import BundleError
from lora_edge.files.disk import remove
from lora_edge.files.lock import Lock
from lora_edge.files.owner import Owner
from lora_edge.files.schema import INSIDE

LOCK_NAME = ".lora_edge.lock"
"""The lock of a folder, in it."""
OWN = "lora_edge"
"""What is hidden in a folder for itself is named after."""
RETIRED = ".old"
"""How a folder's name ends that another is about to replace."""
WAIT = 60.0
"""Seconds for another process to put its files in place."""

_PARTIAL, _LOCK = ".partial", ".lock"
_LONGEST = 40  # characters of a name that its hidden one repeats


def is_hidden(name: str) -> bool:
    """Whether a file's or folder's name is one of those that writers use, and nobody reads."""
    ours = name.startswith(f".{OWN}.")
    return ours and (name == LOCK_NAME or name.endswith((_PARTIAL, _PARTIAL + _LOCK)))


@contextlib.contextmanager
def scratch(folder: Path, name: str) -> Iterator[Path]:
    """A hidden path in ``folder`` for a file or folder to be made; removed at the end.

    What dead processes of this machine have left under the same name goes first.
    """
    clear(folder, name)
    path = folder / f".{name[:_LONGEST]}.{uuid.uuid4().hex[:12]}{_PARTIAL}"
    lock = Lock(path.with_name(path.name + _LOCK), str(path), stale=math.inf)
    with lock.held(WAIT):
        lock.note({"target": name})
        try:
            yield path
        finally:
            remove(path)


def clear(folder: Path, name: str) -> None:
    """Remove what dead processes of this machine have left in ``folder`` under a name."""
    beginning, end = f".{name[:_LONGEST]}.", _PARTIAL + _LOCK
    try:
        found = sorted(entry.name for entry in os.scandir(folder))
    except OSError:
        return
    for file in found:
        if not (file.startswith(beginning) and file.endswith(end)):
            continue
        lock = Lock(folder / file, file, stale=math.inf)
        # Held, of another machine, or not ours to write: it stays.
        with contextlib.suppress(BundleError, OSError), lock.held():
            _remove_left(folder / file.removesuffix(_LOCK), lock.left)


def _remove_left(path: Path, left: Mapping[str, Any]) -> None:
    target, retired = str(left.get("target")), path.with_suffix(RETIRED)
    if Owner.read(left) is None or not is_inside(target) or "/" in target:
        return
    if os.path.lexists(retired) and not os.path.lexists(path.with_name(target)):
        retired.rename(path.with_name(target))  # killed between two renames: the old one comes back
    remove(retired)
    remove(path)


def is_inside(name: object) -> bool:
    """Whether a name from a file is a path below its folder."""
    return isinstance(name, str) and INSIDE.holds(name)
