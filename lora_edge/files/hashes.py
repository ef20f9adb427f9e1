"""The hash of a file."""

from __future__ import annotations

from pathlib import Path


def hash_file(path: Path) -> str:
    """sha256 of a file's content, hexadecimal."""
    import hashlib  # takes milliseconds, which importing the runtime has no need of

    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
