"""The one reader of JSON: strict, within limits, and with an error of ours for all that it refuses.

What is accepted: UTF-8, with or without a byte order mark; objects without duplicate keys; strings
that are Unicode (no lone surrogates); finite numbers, unless the caller asks for others too; at
most :data:`MAX_DEPTH` levels and :data:`MAX_BYTES` bytes. Knows nothing of what a file means.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, TypedDict

from lora_edge.errors import LoraEdgeError

if TYPE_CHECKING:
    from typing import Unpack  # from Python 3.11 on

MAX_BYTES = 64 << 20
"""Longest file that is read, in bytes."""
MAX_LINES_BYTES = 1 << 30
"""Longest file of lines that is read, in bytes."""
MAX_DEPTH = 100
"""Deepest nesting of arrays and objects."""
MAX_DIGITS = 100
"""Longest whole number; tokenizer_config.json holds ``int(1e30)``."""

_LFS = b"version https://git-lfs.github.com/spec/"
_LONG = re.compile(rf"\d{{{MAX_DIGITS}}}")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


class Limits(TypedDict, total=False):
    """What a caller may allow beyond the rule.

    Attributes:
        nonfinite: take ``NaN`` and ``Infinity``, which transformers and PEFT write.
        max_bytes: longest file or text that is read; bytes, or characters of a text.
    """

    nonfinite: bool
    max_bytes: int


class _RefusedError(ValueError):
    """JSON that Python's reader would take."""


def read_json(file: Path, error: type[LoraEdgeError], hint: str, **limits: Unpack[Limits]) -> Any:
    """What a JSON file holds.

    Args:
        file: the file; a pipe or a device is refused.
        error: what is raised where the file is not read.
        hint: of that error: what to do.
        limits: what is allowed beyond the rule.

    Raises:
        LoraEdgeError: of type ``error``: the file is missing, too long, or no JSON as said above.
    """
    data = read_bytes(file, error, hint, max_bytes=limits.get("max_bytes", MAX_BYTES))
    return parse_json(data, str(file), error, hint, **limits)


def read_object(
    file: Path, error: type[LoraEdgeError], hint: str, **limits: Unpack[Limits]
) -> dict[str, Any]:
    """As :func:`read_json`; what the file holds is an object."""
    return _object(read_json(file, error, hint, **limits), str(file), error, hint)


def parse_object(
    data: bytes | str, what: str, error: type[LoraEdgeError], hint: str, **limits: Unpack[Limits]
) -> dict[str, Any]:
    """As :func:`parse_json`; what the text holds is an object."""
    return _object(parse_json(data, what, error, hint, **limits), what, error, hint)


def parse_json(
    data: bytes | str, what: str, error: type[LoraEdgeError], hint: str, **limits: Unpack[Limits]
) -> Any:
    """What a JSON text holds.

    Args:
        data: the text, or its UTF-8 bytes.
        what: what it is called in an error: a file, or a file and a line.
        error: what is raised where it is refused.
        hint: of that error: what to do.
        limits: what is allowed beyond the rule.

    Raises:
        LoraEdgeError: of type ``error``: it is no JSON as said above.
    """
    nonfinite, max_bytes = limits.get("nonfinite", False), limits.get("max_bytes", MAX_BYTES)
    if len(data) > max_bytes:
        raise error(f"{what} is longer than {max_bytes} bytes", hint)
    if isinstance(data, bytes):
        if data.startswith(_LFS):
            raise error(*lfs_pointer(what))
        data = decode_text(data, what, error, hint)
    try:
        parsed = json.loads(
            data.removeprefix("\ufeff"),
            object_pairs_hook=_pairs,
            parse_float=float if nonfinite else _finite,
            parse_int=_whole if _LONG.search(data) else int,
            parse_constant=float if nonfinite else _constant,
        )
        if data.count("[") + data.count("{") > MAX_DEPTH:
            _check_depth(parsed)
        if _SURROGATE.search(data):
            _check_texts(parsed)
    except _RefusedError as refused:
        raise error(f"{what} is refused: {refused}", hint) from refused
    except ValueError as fault:
        raise error(f"{what} is not JSON: {fault}", hint) from fault
    except RecursionError:
        raise error(f"{what} is refused: {_DEEP}", hint) from None
    return parsed


def read_lines(
    file: Path, error: type[LoraEdgeError], hint: str, *, max_bytes: int = MAX_LINES_BYTES
) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file (or a pipe) that are not blank, with their numbers from 1.

    Raises:
        LoraEdgeError: of type ``error``: the file is missing, too long, or not UTF-8.
    """
    # Not splitlines(): JSON may hold other signs that end a line.
    data = read_bytes(file, error, hint, max_bytes=max_bytes, pipe=True)
    lines = decode_text(data, str(file), error, hint).split("\n")
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1)]
    return [(number, line) for number, line in numbered if line.strip()]


def decode_text(data: bytes, what: str, error: type[LoraEdgeError], hint: str) -> str:
    """Text of UTF-8 bytes, without a byte order mark; ``what`` names them in an error.

    Raises:
        LoraEdgeError: of type ``error``: the bytes are not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise error(f"{what} is not UTF-8: byte {fault.start} is wrong", hint) from fault


def read_bytes(
    file: Path,
    error: type[LoraEdgeError],
    hint: str,
    *,
    max_bytes: int = MAX_BYTES,
    pipe: bool = False,
) -> bytes:
    """The bytes of a regular file.

    Args:
        file: the file.
        error: what is raised where it is not read.
        hint: of that error: what to do.
        max_bytes: longest file that is read.
        pipe: the user named the file, who may have meant a pipe.

    Raises:
        LoraEdgeError: of type ``error``: the file is missing, too long, or a pipe or device.
    """
    try:
        if not pipe and file.exists() and not file.is_file():
            raise error(f"{file} is not a regular file", hint)
        with file.open("rb") as stream:
            data = b"".join(_chunks(stream, max_bytes + 1))
    except (OSError, ValueError) as fault:  # ValueError: a NUL in the path
        reason = getattr(fault, "strerror", None) or fault
        raise error(f"{file} cannot be read: {reason}", hint) from fault
    if len(data) > max_bytes:
        raise error(f"{file} is longer than {max_bytes} bytes", hint)
    return data


def _chunks(stream: BinaryIO, most: int) -> Iterator[bytes]:
    # read() takes as much memory as it is asked to read.
    while most > 0 and (chunk := stream.read(min(most, 1 << 20))):
        yield chunk
        most -= len(chunk)


def lfs_pointer(what: str) -> tuple[str, str]:
    """Message and hint for a file of which there is a Git LFS pointer only."""
    return (
        f"{what} is a Git LFS pointer; the file itself was not fetched",
        "Fetch it in its repository with: git lfs pull",
    )


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file that begins like this is a Git LFS pointer."""
    return head.startswith(_LFS)


def _object(data: Any, what: str, error: type[LoraEdgeError], hint: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise error(f"{what} is not a JSON object", hint)
    return data


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RefusedError(f"the key {key!r} occurs twice in an object")
            seen.add(key)
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _RefusedError(f"the number {text[:40]} is too large")
    return value


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _RefusedError(f"a whole number has {len(text)} digits")
    return int(text)


def _constant(text: str) -> NoReturn:
    raise _RefusedError(f"it holds {text}, which is no JSON")


_DEEP = f"arrays or objects are nested more than {MAX_DEPTH} deep"


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise _RefusedError(_DEEP)


def _check_texts(value: Any) -> None:
    """Refuse keys and values that are not Unicode; the depth is checked already."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise _RefusedError(f"the string {value[:40]!r} holds a lone surrogate") from None
    elif isinstance(value, dict | list):
        for inner in value:
            _check_texts(inner)
        if isinstance(value, dict):
            for inner in value.values():
                _check_texts(inner)
