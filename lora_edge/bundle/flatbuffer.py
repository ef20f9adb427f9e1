"""Reads a FlatBuffer: tables of fields at offsets, each checked to lie inside.

The ``flatbuffers`` package follows any offset it is given; what is read here may be damaged. The
format: https://flatbuffers.dev/internals/, little-endian; a table begins with the distance to its
vtable, which says how far from the table each field is, 0 for one that is absent.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from struct import error as StructError

_U16, _I32, _U32, _I64 = (Struct(f"<{letter}") for letter in "HiIq")


class FlatBuffer:
    """The content of a file.

    Args:
        content: its bytes.

    Every method raises ValueError where what it reads is not all inside the content.
    """

    def __init__(self, content: memoryview) -> None:
        self.content = content

    def root(self) -> int:
        """The place of the root table."""
        return self._follow(0)

    def field(self, table: int, number: int) -> int | None:
        """The place of a table's field; None if it is absent."""
        vtable = table - self._read(_I32, table)
        at = 4 + 2 * number
        if at + 2 > self._read(_U16, vtable):
            return None
        distance = self._read(_U16, vtable + at)
        return table + distance if distance else None

    def integer(self, table: int, number: int) -> int:
        """A field of 32 bits, 0 if it is absent."""
        at = self.field(table, number)
        return 0 if at is None else self._read(_I32, at)

    def text(self, table: int, number: int) -> str:
        """A string, empty if it is absent."""
        start, count = self.vector(table, number, 1)
        return str(self.content[start : start + count], "utf-8")

    def longs(self, table: int, number: int) -> list[int]:
        """A vector of integers of 64 bits, empty if it is absent."""
        start, count = self.vector(table, number, 8)
        return [self._read(_I64, start + 8 * index) for index in range(count)]

    def tables(self, table: int, number: int) -> Iterator[int]:
        """The places of the tables of a vector, none if it is absent."""
        start, count = self.vector(table, number, 4)
        for index in range(count):
            yield self._follow(start + 4 * index)

    def vector(self, table: int, number: int, size: int) -> tuple[int, int]:
        """Where the entries of a vector begin, each of ``size`` bytes, and how many there are."""
        at = self.field(table, number)
        if at is None:
            return 0, 0
        place = self._follow(at)
        start, count = place + 4, self._read(_U32, place)
        if start + count * size > len(self.content):
            raise ValueError(f"{count} entries from byte {start} lie outside of the file")
        return start, count

    def _follow(self, at: int) -> int:
        return at + self._read(_U32, at)

    def _read(self, kind: Struct, at: int) -> int:
        try:
            if at >= 0:  # else it would be counted from the end
                found: int = kind.unpack_from(self.content, at)[0]
                return found
        except StructError:
            pass  # told below
        raise ValueError(f"byte {at} lies outside of the file")
