"""The wire format of protobuf: fields read from bytes, and written. Needs no protobuf."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_VARINT, _EIGHT, _BYTES = 0, 1, 2


class Field(NamedTuple):
    """A field of a message.

    Attributes:
        number: its number.
        whole: its bytes, key included: what a copy of the field is.
        value: its content, if that is of a length of its own (text, bytes, a message).
        integer: its value, if that is a varint.
    """

    number: int
    whole: memoryview
    value: memoryview | None
    integer: int


def fields(data: bytes | memoryview) -> Iterator[Field]:
    """The fields of a message, in their order.

    Raises:
        IndexError: the message ends within a field's key or length.
    """
    view, at = memoryview(data), 0
    while at < len(view):
        start = at
        key, at = _read_varint(view, at)
        kind, value, integer = key & 7, None, 0
        if kind == _VARINT:
            integer, at = _read_varint(view, at)
        elif kind == _BYTES:
            size, at = _read_varint(view, at)
            value = view[at : at + size]
            at += size
        else:
            at += 8 if kind == _EIGHT else 4
        yield Field(key >> 3, view[start:at], value, integer)


def messages(data: bytes | memoryview) -> Iterator[tuple[int, memoryview]]:
    """(number, content) of the fields that have a length of their own."""
    for field in fields(data):
        if field.value is not None:
            yield field.number, field.value


def message(data: bytes | memoryview, wanted: int) -> memoryview:
    """The content of the first field of that number; empty where there is none."""
    return next((value for number, value in messages(data) if number == wanted), memoryview(b""))


def text(data: bytes | memoryview, wanted: int) -> str:
    """The first field of that number as text; empty where there is none."""
    return bytes(message(data, wanted)).decode()


def number(data: bytes | memoryview, wanted: int) -> int:
    """The first varint of that number, as an unsigned integer; 0 where there is none."""
    found = (x.integer for x in fields(data) if x.number == wanted and x.value is None)
    return next(found, 0)


def varint_field(number: int, value: int) -> bytes:
    """A field of an integer that is not negative."""
    return _varint(number << 3 | _VARINT) + _varint(value)


def bytes_field(number: int, value: bytes | str) -> bytes:
    """A field of text, bytes or a message."""
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
