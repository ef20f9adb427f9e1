"""Write and read ``.onnx_adapter`` files through ONNX Runtime's own ``AdapterFormat``.

Knows nothing of bundles or sessions. The format is a FlatBuffer of named tensors without a
checksum: a file that was changed inside reads without an error, so whoever opens one verifies its
hash first. Tensors of rank 0 (a zero-size dimension) survive the round trip.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from lora_edge.errors import BundleError
from lora_edge.maths.lora import FloatArray

ADAPTER_VERSION = 1
MODEL_VERSION = 1
_FILE_ID = b"TORT"


def write_adapter(path: Path, tensors: Mapping[str, FloatArray]) -> None:
    """Write named float32 tensors to ``path``.

    Args:
        path: the file to write; its folder exists.
        tensors: graph input name -> array of any shape, zero-size dimensions allowed.

    Raises:
        BundleError: the file cannot be written.
    """
    # AdapterFormat copies nothing until export_adapter: the arrays must live until it is done.
    arrays = {name: np.ascontiguousarray(t, np.float32) for name, t in tensors.items()}
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


def read_adapter(path: Path) -> dict[str, FloatArray]:
    """Read the tensors of an adapter file into memory of their own.

    Returns:
        Graph input name -> float32 array, in the order of the names.

    Raises:
        BundleError: the file is missing, is not an adapter file, or is cut off.
    """
    hint = "Copy the bundle again, or add the adapter again."
    try:
        with path.open("rb") as stream:
            head = stream.read(8)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}", hint) from error
    if head[4:8] != _FILE_ID:
        raise BundleError(f"{path} is not an .onnx_adapter file", hint)
    try:
        # The tensors are views of the file's buffer, which this object owns, aligned to 4 bytes.
        adapter = ort.AdapterFormat.read_adapter(str(path))
        parameters = adapter.get_parameters()
        tensors = {name: np.array(parameters[name].numpy()) for name in sorted(parameters)}
        del parameters, adapter
    except (RuntimeError, ValueError) as error:
        raise BundleError(f"{path} is damaged: {_first_line(error)}", hint) from error
    for name, tensor in tensors.items():
        if tensor.dtype != np.float32:
            raise BundleError(f"{path}: {name} is {tensor.dtype}, expected float32", hint)
    return tensors


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
