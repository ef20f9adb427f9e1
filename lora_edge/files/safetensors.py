"""Reading safetensors files, and renaming their tensors, with numpy alone, bfloat16 included.

The safetensors package cannot give numpy a bfloat16 tensor, nor a tensor's raw bytes without
loading the whole file; the format is a JSON header and a block of bytes, so the reader is short.
What the package refuses is refused here too; so are duplicate names, of which it takes the last.
Source: https://github.com/huggingface/safetensors, "Format" and ``safetensors/src/tensor.rs``.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_edge.errors import LoraEdgeError
from lora_edge.files.json import is_lfs_pointer, lfs_pointer, parse_object

MAX_HEADER = 100_000_000
"""Longest header, in bytes; the package's own limit."""

_FLOATS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_MOST = 1 << 64


class TensorRecord(NamedTuple):
    """Where a tensor's bytes are: file, dtype (safetensors' name), shape, first and last byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class _DamageError(ValueError):
    """What is wrong with a file."""


def read_header(file: Path, error: type[LoraEdgeError], hint: str) -> dict[str, TensorRecord]:
    """The tensors of a safetensors file, by name; their bytes are not read.

    Args:
        file: the file.
        error: what is raised where it is refused.
        hint: of that error: what to do.

    Raises:
        LoraEdgeError: of type ``error``: the file cannot be read, is not safetensors, is cut off or
            too long, or its tensors overlap, leave holes, or are not of their shape's size.
    """
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            text = stream.read(length) if length <= min(MAX_HEADER, size - 8) else b""
    except OSError as fault:
        raise error(f"{file} cannot be read: {fault.strerror or fault}", hint) from fault
    if is_lfs_pointer(start + text) or start == b"version ":
        raise error(*lfs_pointer(str(file)))
    what = f"{file} is not a whole safetensors file"
    if len(start) < 8 or length > size - 8:
        raise error(f"{what}: its header of {length} bytes is cut off", hint)
    if length > MAX_HEADER:
        raise error(f"{what}: its header of {length} bytes is too long", hint)
    if not text.startswith(b"{"):
        raise error(f"{what}: its header does not begin with a brace", hint)
    header = parse_object(text, f"{what}: its header", error, hint, max_bytes=MAX_HEADER)
    try:
        _check_metadata(header.pop("__metadata__", None))
        records = {key: _record(file, key, value, 8 + length) for key, value in header.items()}
        _check_places(records, 8 + length, size)
    except _DamageError as damage:
        raise error(f"{what}: {damage}", hint) from None
    return records


def _check_metadata(metadata: Any) -> None:
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise _DamageError("its metadata is not a map of texts")


def _record(file: Path, key: str, value: Any, start: int) -> TensorRecord:
    if not isinstance(value, dict):
        raise _DamageError(f"tensor {key!r} is {type(value).__name__}, expected an object")
    dtype: Any = value.get("dtype")
    shape: Any = value.get("shape")
    offsets: Any = value.get("data_offsets")
    bits = _BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise _DamageError(f"tensor {key!r} has the dtype {dtype!r}, which is unknown")
    if not _are_sizes(shape):
        raise _DamageError(f"tensor {key!r} has the shape {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise _DamageError(f"tensor {key!r} has the offsets {offsets!r}")
    count, held = math.prod(shape), offsets[1] - offsets[0]
    if count >= _MOST or count * bits != held * 8:
        raise _DamageError(f"tensor {key!r} of shape {shape} and dtype {dtype} has {held} bytes")
    return TensorRecord(file, str(dtype), tuple(shape), start + offsets[0], start + offsets[1])


def _are_sizes(values: Any) -> bool:
    # bool is an int
    if not isinstance(values, list):
        return False
    return all([type(value) is int and 0 <= value < _MOST for value in values])


def _check_places(records: dict[str, TensorRecord], start: int, size: int) -> None:
    """The tensors lie one behind the other, without holes, and the last one ends the file."""
    end = start
    for key, record in sorted(records.items(), key=lambda item: (item[1].begin, item[1].end)):
        if record.end > size:
            raise _DamageError(
                f"the file is cut off: tensor {key!r} ends at byte {record.end}, the file at {size}"
            )
        if record.begin != end:
            what = "overlaps the one before" if record.begin < end else "leaves a hole before it"
            raise _DamageError(f"tensor {key!r} {what}, at byte {record.begin}")
        end = record.end
    if end != size:
        raise _DamageError(f"{size - end} bytes follow the last tensor")


def read_float32(record: TensorRecord) -> NDArray[np.float32]:
    """A tensor's values as float32.

    Raises:
        ValueError: the dtype is not F64, F32, F16 or BF16.
    """
    dtype = _FLOATS.get(record.dtype)
    if dtype is None:
        raise ValueError(f"dtype is {record.dtype}, expected one of {', '.join(_FLOATS)}")
    count = math.prod(record.shape)
    values = np.fromfile(record.file, dtype, count=count, offset=record.begin)
    if record.dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False).reshape(record.shape)


def read_bytes(record: TensorRecord) -> Iterator[bytes]:
    """A tensor's bytes in chunks of at most 1 MiB."""
    with record.file.open("rb") as stream:
        stream.seek(record.begin)
        left = record.end - record.begin
        while left > 0 and (chunk := stream.read(min(left, 1 << 20))):
            yield chunk
            left -= len(chunk)


def rename_tensors(source: Path, target: Path, name: Callable[[str], str | None]) -> None:
    """Copy a safetensors file with other names, its tensors byte by byte.

    Args:
        source: a file that :func:`read_header` takes.
        target: written.
        name: old name -> new name, or ``None`` for a tensor that is left out.
    """
    records = read_header(source, LoraEdgeError, "Copy the file again.")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    kept: list[TensorRecord] = []
    place = 0
    for old, record in sorted(records.items(), key=lambda item: item[1].begin):
        new = name(old)
        if new is None:
            continue
        size = record.end - record.begin
        header[new] = {
            "dtype": record.dtype,
            "shape": list(record.shape),
            "data_offsets": [place, place + size],
        }
        kept.append(record)
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for record in kept:
            for chunk in read_bytes(record):
                stream.write(chunk)
