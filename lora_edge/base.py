"""A base model on disk: its folder, its config, its tensors and its fingerprint; without PyTorch.

Knows Hugging Face's folder layout and safetensors; knows nothing of architectures.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_edge.errors import BaseModelError, MissingDependencyError

_WEIGHT_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
_NUMPY = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


class TensorRecord(NamedTuple):
    """Where a tensor's bytes are: file, dtype (safetensors' name), shape, first and last byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Base:
    """A base model's folder.

    Attributes:
        directory: the folder that holds ``config.json`` and the safetensors files.
        name_or_path: what the user called it: a path or a hub id.
        config: the content of ``config.json``.
    """

    directory: Path
    name_or_path: str
    config: dict[str, Any]

    @property
    def model_type(self) -> str:
        """``model_type`` of the config, e.g. ``llama``."""
        return str(self.config.get("model_type", "unknown"))

    def keys(self) -> tuple[str, ...]:
        """Names of all tensors of the checkpoint, sorted."""
        return tuple(sorted(_records(self.directory)))

    def weight(self, key: str) -> NDArray[np.float32]:
        """One tensor of the checkpoint as float32, in the checkpoint's own layout.

        Raises:
            BaseModelError: there is no such tensor, or its dtype is not a floating-point one.
        """
        record = _records(self.directory).get(key)
        if record is None:
            raise BaseModelError(
                f"{self.name_or_path} has no tensor {key!r}", "Is this the adapter's own base?"
            )
        raw = np.fromfile(
            record.file, np.uint8, count=record.end - record.begin, offset=record.begin
        )
        if record.dtype == "BF16":
            # bfloat16 is the upper half of a float32.
            return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(record.shape)
        dtype = _NUMPY.get(record.dtype)
        if dtype is None or dtype.kind != "f":
            raise BaseModelError(
                f"{self.name_or_path}: tensor {key!r} is {record.dtype}, expected a float type",
                "Use the full-precision checkpoint as the base.",
            )
        return raw.view(dtype).astype(np.float32).reshape(record.shape)

    def fingerprint(self) -> str:
        """sha256 over every tensor's name, dtype, shape and bytes; independent of the sharding.

        The fingerprint identifies the weights that an adapter was trained on, so it does not
        depend on file names, metadata or the order of the tensors in their files.
        """
        return _fingerprint(self.directory)


def resolve_base(name_or_path: str | os.PathLike[str]) -> Base:
    """Find a base model: a local folder, or else a hub id that is downloaded or found in the cache.

    Raises:
        BaseModelError: no such folder or hub id; no config.json; no safetensors; an adapter.
        MissingDependencyError: a hub id is given and ``huggingface_hub`` is not installed.
    """
    name = os.fspath(name_or_path)
    directory = Path(name)
    if not directory.is_dir():
        if directory.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise BaseModelError(
                f"base model {name!r} is not a folder",
                "Give the folder of a Hugging Face model, or a hub id such as ORG/NAME.",
            )
        directory = _download(name)
    config_file = directory / "config.json"
    if not config_file.is_file():
        if (directory / "adapter_config.json").is_file():
            raise BaseModelError(
                f"{name} is an adapter, not a base model",
                "Give its base here, and the adapter with -a NAME=DIR.",
            )
        raise BaseModelError(
            f"{name} has no config.json", "Give the folder of a Hugging Face model."
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"{config_file} cannot be read: {error}", "Download it again."
        ) from error
    if not any(directory.glob("*.safetensors")):
        raise BaseModelError(
            f"{name} has no safetensors weights",
            "Convert the checkpoint: load it with transformers and save_pretrained() it again.",
        )
    return Base(directory, name, config)


def read_header(file: Path) -> dict[str, TensorRecord]:
    """Read a safetensors header and check it against the file's size.

    Raises:
        BaseModelError: the file is not safetensors, or is cut off.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        records = {
            key: TensorRecord(
                file,
                value["dtype"],
                tuple(value["shape"]),
                8 + length + value["data_offsets"][0],
                8 + length + value["data_offsets"][1],
            )
            for key, value in header.items()
            if key != "__metadata__"
        }
    except (ValueError, KeyError, struct.error) as error:
        raise BaseModelError(
            f"{file} is not a whole safetensors file: {error}", "Download or copy it again."
        ) from error
    expected = max((record.end for record in records.values()), default=0)
    if expected > size:
        raise BaseModelError(
            f"{file} is cut off: {size} bytes, expected {expected}", "Download or copy it again."
        )
    return records


@functools.lru_cache(maxsize=8)
def _records(directory: Path) -> dict[str, TensorRecord]:
    records: dict[str, TensorRecord] = {}
    for file in sorted(directory.glob("*.safetensors")):
        records.update(read_header(file))
    return records


@functools.lru_cache(maxsize=8)
def _fingerprint(directory: Path) -> str:
    digest = hashlib.sha256()
    for key, record in sorted(_records(directory).items()):
        digest.update(f"{key}\0{record.dtype}\0{record.shape}\0".encode())
        with record.file.open("rb") as stream:
            stream.seek(record.begin)
            left = record.end - record.begin
            while left:
                chunk = stream.read(min(left, 1 << 20))
                if not chunk:
                    raise BaseModelError(f"{record.file} is cut off", "Download or copy it again.")
                digest.update(chunk)
                left -= len(chunk)
    return digest.hexdigest()


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError as error:
        raise MissingDependencyError(
            f"{name!r} is not a folder, and hub ids need huggingface_hub",
            "Install it with: pip install 'lora-edge[export]', or give a local folder.",
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(_WEIGHT_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise BaseModelError(
            f"base model {name!r} is neither a folder nor a hub id that can be reached: {first_line}",
            "Check the name, your network and HF_TOKEN; or download it and give the folder.",
        ) from error
