"""A file at a second place: a hard link where that can be, else a copy."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def place(source: Path, target: Path, *, link: bool) -> None:
    """Put a file at ``target``, whose folder is made.

    Args:
        source: the file.
        target: where it is to be too; nothing may be there.
        link: by a hard link, which takes no room of its own, where the file system can do that.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(source.resolve(), target)
        except OSError:  # another disk, or a file system without hard links
            target.unlink(missing_ok=True)
        else:
            return
    shutil.copyfile(source, target)
