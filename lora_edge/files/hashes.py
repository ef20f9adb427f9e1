"""The hash of a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_CHUNK = 1 << 20  # fits the processor's cache: what was read is hashed from there


def hash_file(path: Path, size: int | None = None) -> str:
    """sha256 of a file's content, hexadecimal; with ``size`` of its first bytes alone."""
    import hashlib  # takes milliseconds, which importing the runtime has no need of

    digest, rest = hashlib.sha256(), sys.maxsize if size is None else size
    with path.open("rb") as stream:
        while chunk := stream.read(min(_CHUNK, rest)):
            digest.update(chunk)
            rest -= len(chunk)
    return digest.hexdigest()


def read_hashed(path: Path, size: int) -> tuple[NDArray[np.uint8], str]:
    """A file's content and the hash of that very content, read once.

    It is memory of our own and no map of the file: a program that writes into the file afterwards
    changes nothing, and one that cuts it off does not end the process.

    Args:
        path: the file.
        size: its bytes; one that has fewer by now gives fewer, of one that has more the rest is
            left out.

    Returns:
        ``[size] uint8``, and the sha256, hexadecimal.
    """
    import hashlib

    import numpy as np

    content = np.empty(size, np.uint8)
    view = content.data
    digest, end = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(view[end : end + _CHUNK]):
            digest.update(view[end : end + count])
            end += count
    return content[:end], digest.hexdigest()
