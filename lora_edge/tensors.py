"""Reading safetensors files with numpy alone, bfloat16 included.

The safetensors package cannot give numpy a bfloat16 tensor, nor a tensor's raw bytes without
loading the whole file; the format is a JSON header and a block of bytes, so the reader is short.
Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_FLOATS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


class TensorRecord(NamedTuple):
    """Where a tensor's bytes are: file, dtype (safetensors' name), shape, first and last byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: Path) -> dict[str, TensorRecord]:
    """The tensors of a safetensors file, by name; their bytes are not read.

    Raises:
        ValueError: the file is not safetensors, is cut off, or a tensor's size is not its shape's.
    """
    size = file.stat().st_size
    records: dict[str, TensorRecord] = {}
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError(f"its header of {length} bytes is cut off")
            header = json.loads(stream.read(length))
        for key, value in header.items():
            if key != "__metadata__":
                begin, end = (8 + length + int(offset) for offset in value["data_offsets"])
                shape = tuple(int(dim) for dim in value["shape"])
                records[key] = TensorRecord(file, str(value["dtype"]), shape, begin, end)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
    for key, record in records.items():
        if not 8 + length <= record.begin <= record.end <= size:
            raise ValueError(
                f"{file} is cut off: tensor {key!r} ends at byte {record.end}, the file at {size}"
            )
        dtype = _FLOATS.get(record.dtype)
        if min(record.shape, default=0) < 0:
            raise ValueError(f"{file}: tensor {key!r} has the shape {record.shape}")
        if dtype and record.end - record.begin != math.prod(record.shape) * dtype.itemsize:
            raise ValueError(
                f"{file}: tensor {key!r} of shape {record.shape} and dtype {record.dtype} "
                f"has {record.end - record.begin} bytes"
            )
    return records


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
