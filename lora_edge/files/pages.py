"""Memory that is given back while nobody needs it: what maps a file, and what was freed.

A page of a file that was given back is read from the file again when it is touched. Only Linux
tells what is mapped; elsewhere nothing is given back.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_DONTNEED = getattr(mmap, "MADV_DONTNEED", 4)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def trim(*, cycles: bool = False) -> None:
    """Give back what the C library's allocator keeps of freed memory, where it is glibc's.

    It keeps blocks of megabytes, and what is freed between others stays: one model after another,
    a layer in float64 after one in float32, and as much again is taken.

    Args:
        cycles: free objects first that only each other hold, such as a graph's nodes. It takes
            tenths of a second, whatever there is to free: for large models.
    """
    if cycles:
        gc.collect()
    if not _MAPS.exists():
        return
    libc = _libc()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


class MappedFiles:
    """The places of this process' memory that hold files, as they are now."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Find them.

        Args:
            files: whose mappings are wanted.
        """
        wanted = {os.path.realpath(file) for file in files}
        self._begins: list[int] = []
        self._ends: list[int] = []
        if not _MAPS.exists():
            return
        for line in _MAPS.read_text(errors="replace").splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] in wanted:
                begin, _, end = fields[0].partition("-")
                self._begins.append(int(begin, 16))
                self._ends.append(int(end, 16))

    def without(self, other: MappedFiles) -> MappedFiles:
        """Those places that were not there when others were found."""
        known = set(zip(other._begins, other._ends, strict=True))
        new = MappedFiles(())
        for begin, end in zip(self._begins, self._ends, strict=True):
            if (begin, end) not in known:
                new._begins.append(begin)
                new._ends.append(end)
        return new

    def hold(self, address: int, size: int) -> bool:
        """Whether these bytes of the memory are a file's."""
        index = bisect_right(self._begins, address) - 1
        return size > 0 and index >= 0 and address + size <= self._ends[index]

    def give_back(self, address: int, size: int) -> None:
        """Let the system take the memory of bytes that are a file's; others are left alone.

        What was written there since is lost: only for memory that is read.
        """
        if not self.hold(address, size):
            return
        page = mmap.PAGESIZE
        begin, end = -(-address // page) * page, (address + size) // page * page
        if begin < end:
            libc = _libc()
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONTNEED)

    def give_all_back(self) -> None:
        """Let the system take the memory of all that is mapped; as :meth:`give_back`."""
        for begin, end in zip(self._begins, self._ends, strict=True):
            _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONTNEED)
