"""Numpy's ``.npz`` files: within a limit of memory, without pickles, any damage a refusal."""

from __future__ import annotations

import io
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.errors import LoraEdgeError
from lora_edge.files.json import read_bytes

MAX_BYTES = 256 << 20
"""Most that a file may take, unpacked."""

# What zipfile, zlib and numpy raise for damage; RuntimeError: a password, NotImplementedError: a
# way of packing that is not built in.
_DAMAGE = (
    EOFError, KeyError, LookupError, MemoryError, NotImplementedError, OSError, OverflowError,
    RuntimeError, SyntaxError, TypeError, ValueError, struct.error, tokenize.TokenError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def read_arrays(file: Path, error: type[LoraEdgeError], hint: str) -> dict[str, NDArray[Any]]:
    """Every array of an ``.npz`` file, by name.

    Raises:
        LoraEdgeError: of type ``error``: the file is missing, damaged, or takes more than
            :data:`MAX_BYTES`.
    """
    content = read_bytes(file, error, hint)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            found: dict[str, NDArray[Any]] = {}
            members = packed.infolist()
            if sum(member.file_size for member in members) > MAX_BYTES:
                raise error(f"{file} takes more than {MAX_BYTES} bytes when unpacked", hint)
            for member in members:
                data = packed.read(member)
                found[member.filename.removesuffix(".npy")] = _array(data)
            return found
    except _DAMAGE as fault:
        raise error(f"{file} is not a whole .npz file: {fault}", hint) from fault


def _array(data: bytes) -> NDArray[Any]:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
        version, np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read(stream)
    # Before memory is taken for it.
    held = len(data) - stream.tell()
    count = 1
    for size in shape:
        count *= size
    if min(shape, default=0) < 0 or count * dtype.itemsize != held:
        raise ValueError(f"an array of shape {shape} has {held} bytes")
    found: NDArray[Any] = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    return found
