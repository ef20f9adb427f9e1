"""Reads a FlatBuffer: tables of fields at offsets, each checked to lie inside.

The ``flatbuffers`` package follows any offset it is given; what is read here may be damaged. The
format: https://flatbuffers.dev/internals/, little-endian; a table begins with the distance to its
vtable, which says how far from the table each field is, 0 for one that is absent.
"""

from __future__ import annotations

from struct import Struct, calcsize, unpack_from

_U16, _I32, _U32 = Struct("<H"), Struct("<i"), Struct("<I")


class FlatBuffer:
    """The content of a file.

    Args:
        content: its bytes.

    Every method raises ValueError where what it reads is not all inside the content.
    """

    def __init__(self, content: memoryview) -> None:
        self._content = content
        self._vtables: dict[int, tuple[int, ...]] = {}  # tables of one kind share theirs

    def root(self) -> int:
        """The place of the root table."""
        return self._u32(0)

    def field(self, table: int, number: int) -> int | None:
        """The place of a table's field; None if it is absent."""
        at = table - self._one(_I32, table)
        distances = self._vtables.get(at)
        if distances is None:
            size = self._one(_U16, at)
            distances = self._many(f"<{max(size // 2 - 2, 0)}H", at + 4)
            self._vtables[at] = distances
        distance = distances[number] if number < len(distances) else 0
        return table + distance if distance else None

    def integer(self, table: int, number: int) -> int:
        """A field of 32 bits, 0 if it is absent."""
        at = self.field(table, number)
        return 0 if at is None else self._one(_I32, at)

    def text(self, table: int, number: int) -> str:
        """A string, empty if it is absent."""
        start, count = self.vector(table, number, 1)
        return str(self._content[start : start + count], "utf-8")

    def longs(self, table: int, number: int) -> tuple[int, ...]:
        """A vector of integers of 64 bits, empty if it is absent."""
        start, count = self.vector(table, number, 8)
        return self._many(f"<{count}q", start)

    def tables(self, table: int, number: int) -> list[int]:
        """The places of the tables of a vector, none if it is absent."""
        start, count = self.vector(table, number, 4)
        distances = self._many(f"<{count}I", start)
        return [start + 4 * index + distance for index, distance in enumerate(distances)]

    def vector(self, table: int, number: int, size: int) -> tuple[int, int]:
        """Where the entries of a vector begin, each of ``size`` bytes, and how many there are."""
        at = self.field(table, number)
        if at is None:
            return 0, 0
        place = at + self._u32(at)
        start, count = place + 4, self._u32(place)
        if start + count * size > len(self._content):
            raise ValueError(f"{count} entries from byte {start} lie outside of the file")
        return start, count

    def _u32(self, at: int) -> int:
        return self._one(_U32, at)

    def _one(self, kind: Struct, at: int) -> int:
        if not 0 <= at <= len(self._content) - kind.size:
            raise ValueError(f"byte {at} lies outside of the file")
        found: int = kind.unpack_from(self._content, at)[0]
        return found

    def _many(self, kinds: str, at: int) -> tuple[int, ...]:
        if not 0 <= at <= len(self._content) - calcsize(kinds):
            raise ValueError(f"byte {at} lies outside of the file")
        return unpack_from(kinds, self._content, at)
