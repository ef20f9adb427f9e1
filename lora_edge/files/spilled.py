"""Large arrays whose memory is a file's: the system can write them out, and they can be let go.

An array of outputs, positions by vocabulary, is written once and read a few rows at a time. Kept in
a file without a name, only the rows that are being read take memory. Its values are those of any
other array. Where the system offers no such file, or the disk has no room, it is a plain array.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

LEAST = 1 << 20
"""Bytes from which on an array is worth a file."""

_SPILLS = hasattr(os, "posix_fallocate") and hasattr(mmap.mmap, "madvise")
_DONTNEED = getattr(mmap, "MADV_DONTNEED", 4)
_found: dict[int, tuple[weakref.ref[mmap.mmap], int]] = {}  # by address: the map, and its bytes


def spilled(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """A new array, to be written as a whole: in a file from :data:`LEAST` bytes on.

    Args:
        shape: any.
        dtype: any of a fixed size.

    Returns:
        ``shape``, of that dtype; the values are not set.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = _file(size) if _SPILLS and size >= LEAST else None
    if memory is None:
        return np.empty(shape, dtype)
    flat = np.frombuffer(memory, np.uint8)
    address = int(flat.ctypes.data)

    def gone(own: weakref.ref[mmap.mmap]) -> None:
        known = _found.get(address)
        if known is not None and known[0] is own:  # or else another is there by now
            del _found[address]

    _found[address] = weakref.ref(memory, gone), size
    whole: NDArray[Any] = flat[:size].view(dtype).reshape(shape)
    return whole


def moved(array: NDArray[Any]) -> NDArray[Any]:
    """An array's values in a file, where it is large and is not there already; else the array."""
    if array.nbytes < LEAST or _place(array) is not None:
        return array
    found = spilled(array.shape, array.dtype)
    for part in by_rows(found):
        found[part] = array[part]
    return found


def let_go(*arrays: NDArray[Any] | None) -> None:
    """Give the memory of arrays back, of those that are in files; their values stay.

    Who reads one again reads the file again. Of a view, pages that it shares with the rest of its
    array stay.
    """
    for array in arrays:
        place = None if array is None or not array.flags.c_contiguous else _place(array)
        if array is None or place is None:
            continue
        memory, start = place
        page = mmap.PAGESIZE
        begin, end = -(-start // page) * page, (start + array.nbytes) // page * page
        if start + array.nbytes == len(memory):
            end = len(memory)
        if begin < end:
            memory.madvise(_DONTNEED, begin, end - begin)


def by_rows(
    values: NDArray[Any], *others: NDArray[Any] | None, numbers: int = 1 << 19
) -> Iterator[slice]:
    """Some rows at a time of all of an array's; what was read is let go before the next.

    Args:
        values: ``[rows, …]``.
        others: arrays with the same rows that are read, or written, along.
        numbers: how many numbers of ``values`` there are in so many rows, at most; at least one
            row.
    """
    step = max(1, numbers // max(1, values[:1].size))
    for start in range(0, len(values), step):
        yield slice(start, start + step)
        # From the first row on: reading brings in pages of the rows before, too.
        let_go(*(x[: start + step] for x in (values, *others) if x is not None))


def _file(size: int) -> mmap.mmap | None:
    """Memory of a file that has no name; ``None``: there is no room for it."""
    with contextlib.suppress(OSError), tempfile.TemporaryFile(prefix="lora-edge-") as file:
        # Reserved, because a write to a mapped file that finds no room ends the process.
        os.posix_fallocate(file.fileno(), 0, size)
        return mmap.mmap(file.fileno(), size)
    return None


def _place(array: NDArray[Any]) -> tuple[mmap.mmap, int] | None:
    """The map that an array is in, and where in it; ``None``: in none."""
    address = int(array.__array_interface__["data"][0])
    for begin, (memory, size) in list(_found.items()):
        if begin <= address and address + array.nbytes <= begin + size:
            found = memory()
            return None if found is None else (found, address - begin)
    return None
