"""``.onnx_adapter`` files: written by ONNX Runtime's own ``AdapterFormat``, read as they lie.

Knows nothing of bundles or sessions. The format is a FlatBuffer of named tensors without a
checksum: a file that was changed inside reads without an error, so whoever opens one verifies its
hash first. Tensors of rank 0 (a zero-size dimension) survive the round trip. ONNX Runtime's own
reader takes a path, reads the file once more than its hash does, and gives tensors that are copied
to outlive it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lora_edge.bundle.flatbuffer import FlatBuffer
from lora_edge.errors import BundleError
from lora_edge.maths.lora import FloatArray

ADAPTER_VERSION = 1
MODEL_VERSION = 1
_FILE_ID = b"TORT"
_FORMAT_VERSION = 1
_HINT = "Copy the bundle again, or add the adapter again."

# adapter_schema.fbs of ONNX Runtime: fields of Adapter and of its Parameters.
_VERSION, _PARAMETERS = 0, 3
_NAME, _DIMS, _TYPE, _DATA = range(4)
_FLOAT = 1
_TYPES = {2: "uint8", 3: "int8", 6: "int32", 7: "int64", 10: "float16", 11: "float64"} | {
    16: "bfloat16"
}


def write_adapter(path: Path, tensors: Mapping[str, FloatArray], *, half: bool = False) -> None:
    """Write named float32 tensors to ``path``.

    Args:
        path: the file to write; its folder exists.
        tensors: graph input name -> array of any shape, zero-size dimensions allowed.
        half: write them as float16, which :func:`read_adapter` does not read.

    Raises:
        BundleError: the file cannot be written.
    """
    # AdapterFormat copies nothing until export_adapter: the arrays must live until it is done.
    kind = np.float16 if half else np.float32
    arrays = {name: np.ascontiguousarray(t, kind) for name, t in tensors.items()}
    values = {name: ort.OrtValue.ortvalue_from_numpy(a) for name, a in arrays.items()}
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(ADAPTER_VERSION)
    adapter.set_model_version(MODEL_VERSION)
    adapter.set_parameters(values)
    try:
        adapter.export_adapter(str(path))
    except RuntimeError as error:
        # ONNX Runtime names its own source line and signature, not the system's reason.
        raise BundleError(
            f"{path} cannot be written whole", "Check the folder and the disk space."
        ) from error
    finally:
        del values, arrays


def read_half(path: Path) -> dict[str, NDArray[np.float16]]:
    """Read the tensors of a file of float16, by ONNX Runtime's own reader, as copies.

    Raises:
        BundleError: the file is missing or is not an adapter file.
    """
    try:
        found = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
    except RuntimeError as error:
        raise BundleError(f"{path} cannot be read", _HINT) from error
    return {name: np.array(value.numpy()) for name, value in found.items()}


def read_adapter(path: Path) -> dict[str, FloatArray]:
    """Read the tensors of an adapter file; nothing checks that they are what was written.

    Returns:
        Graph input name -> float32 array, in the order of the names.

    Raises:
        BundleError: the file is missing, is not an adapter file, or is cut off.
    """
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}", _HINT) from error
    return parse_adapter(content, str(path))


def parse_adapter(content: NDArray[np.uint8], source: str) -> dict[str, FloatArray]:
    """The tensors of an adapter file's content, without a copy.

    Args:
        content: ``[bytes] uint8``; the arrays are views of it.
        source: names the file in errors.

    Returns:
        Graph input name -> float32 array, in the order of the names.

    Raises:
        BundleError: it is not an adapter file, is damaged or cut off, or holds other numbers.
    """
    if bytes(content[4:8]) != _FILE_ID:
        raise BundleError(f"{source} is not an .onnx_adapter file", _HINT)
    try:
        found = list(_tensors(FlatBuffer(content.data), content))
    except ValueError as error:  # UnicodeDecodeError too
        raise BundleError(f"{source} is damaged: {error}", _HINT) from error
    tensors: dict[str, FloatArray] = {}
    for name, kind, tensor in sorted(found, key=lambda each: each[0]):
        if kind != _FLOAT:
            raise BundleError(
                f"{source}: {name} is {_TYPES.get(kind, f'of type {kind}')}, expected float32",
                _HINT,
            )
        if name in tensors:
            raise BundleError(f"{source} is damaged: {name} is there twice", _HINT)
        tensors[name] = tensor
    return tensors


def _tensors(
    buffer: FlatBuffer, content: NDArray[np.uint8]
) -> Iterator[tuple[str, int, FloatArray]]:
    """Name, type and tensor of each parameter; of other types than float32 an empty tensor."""
    root = buffer.root()
    version = buffer.integer(root, _VERSION)
    if version != _FORMAT_VERSION:
        raise ValueError(f"its format is of version {version}, expected {_FORMAT_VERSION}")
    for parameter in buffer.tables(root, _PARAMETERS):
        name, kind = buffer.text(parameter, _NAME), buffer.integer(parameter, _TYPE)
        if kind != _FLOAT:
            yield name, kind, np.empty(0, np.float32)
            continue
        shape = buffer.longs(parameter, _DIMS)
        start, count = buffer.vector(parameter, _DATA, 1)
        if min(shape, default=0) < 0 or math.prod(shape) * 4 != count:
            raise ValueError(f"{name} is {shape} of {count} bytes")
        tensor = content[start : start + count].view(np.float32).reshape(shape)
        # FlatBuffers align the data to 4 bytes; what does not is copied.
        yield name, kind, tensor if tensor.flags.aligned else tensor.copy()
