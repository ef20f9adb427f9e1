"""A file at a second place: a hard link where that can be, else a copy, whole or its beginning."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

_CHUNK = 1 << 20


def place(source: Path, target: Path, *, link: bool, size: int | None = None) -> None:
    """Put a file at ``target``, whose folder is made.

    Args:
        source: the file.
        target: where it is to be too; nothing may be there.
        link: by a hard link, which takes no room of its own, where the file system can do that.
        size: bytes of the file; of one that is longer, the rest is left out. None: all.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if size is not None and source.stat().st_size > size:
        with source.open("rb") as whole, target.open("wb") as beginning:
            while size > 0 and (chunk := whole.read(min(_CHUNK, size))):
                size -= beginning.write(chunk)
        return
    if link:
        try:
            os.link(source.resolve(), target)
        except OSError:  # another disk, or a file system without hard links
            target.unlink(missing_ok=True)
        else:
            return
    shutil.copyfile(source, target)
