"""What is on the disk, and not only on its way there; folders that change places.

Knows the operating system; knows nothing of who writes what.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
from pathlib import Path
from typing import Any

_HERE = -100  # AT_FDCWD
_EXCHANGE = 2  # Linux's RENAME_EXCHANGE and macOS's RENAME_SWAP
_MOUNTS = Path("/proc/self/mountinfo")


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    # Windows flushes only what is open for writing.
    file = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        _sync(file)
    finally:
        os.close(file)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can be asked to."""
    if os.name != "posix":
        return
    file = os.open(path, os.O_RDONLY)
    try:
        _sync(file)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EBADF}:
            raise
    finally:
        os.close(file)


def _sync(file: int) -> None:
    if sys.platform == "darwin":  # whose fsync reaches the drive, not its disk
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
            return
    os.fsync(file)


def sync_tree(folder: Path) -> None:
    """Wait until a folder with all that is below it is on the disk."""
    for place, _, files in os.walk(folder):
        for name in files:
            path = Path(place, name)
            if path.is_file() and not path.is_symlink():
                sync_file(path)
        sync_folder(Path(place))


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it; what is not there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def is_mounted(path: Path) -> bool:
    """Whether a folder is a mount point, which can be filled, and not replaced."""
    if path.is_mount():
        return True
    if not _MOUNTS.is_file():
        return False
    own = str(path.resolve())
    # A bind mount of the same file system shows here only; blanks are written as \\040.
    lines = _MOUNTS.read_text(errors="replace").splitlines()
    return any(line.split()[4].encode().decode("unicode_escape") == own for line in lines)


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; false where the system cannot.

    Raises:
        OSError: it can, and did not.
    """
    names = os.fsencode(one), os.fsencode(other)
    library: Any = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        failed = library.renamex_np(*names, _EXCHANGE)
    elif sys.platform == "linux" and hasattr(library, "renameat2"):
        failed = library.renameat2(_HERE, names[0], _HERE, names[1], _EXCHANGE)
    else:
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}:
        return False
    raise OSError(number, os.strerror(number), str(other))
