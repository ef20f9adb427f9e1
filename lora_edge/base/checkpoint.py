"""A base model on disk: its folder, its config, its tensors and its fingerprint; without PyTorch.

Knows Hugging Face's folder layout and safetensors; knows nothing of architectures.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from lora_edge.errors import BaseModelError
from lora_edge.files.hub import is_hub_id, snapshot
from lora_edge.files.json import read_object
from lora_edge.files.paths import path_inside
from lora_edge.files.safetensors import TensorRecord, read_bytes, read_float32, read_header
from lora_edge.files.schema import decode
from lora_edge.types import path as checked_path

_SINGLE_FILE, _INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_WEIGHT_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")


class _File(NamedTuple):
    path: Path
    modified: int  # ns; so that a cache entry does not outlive the file's content


class _Config(TypedDict, total=False):
    """What is read here of a model's config."""

    model_type: str | None
    architectures: list[str] | None
    is_encoder_decoder: bool | None
    is_decoder: bool | None
    quantization_config: dict[str, Any] | None


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
        return tuple(sorted(_records(self._files())))

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files of the weights."""
        return tuple(_weight_files(self.directory))

    @property
    def size(self) -> int:
        """How many numbers the checkpoint's tensors have together."""
        return sum(math.prod(record.shape) for record in _records(self._files()).values())

    def weight(self, key: str) -> NDArray[np.float32]:
        """One tensor of the checkpoint as float32, in the checkpoint's own layout.

        Raises:
            BaseModelError: there is no such tensor, or its dtype is not a floating-point one.
        """
        record = _records(self._files()).get(key)
        if record is None:
            raise BaseModelError(
                f"{self.name_or_path} has no tensor {key!r}", "Is this the adapter's own base?"
            )
        try:
            return read_float32(record)
        except ValueError as error:
            raise BaseModelError(
                f"{self.name_or_path}: {key}: {error}",
                "Use the full-precision checkpoint as the base.",
            ) from error

    def parameter(self, path: str) -> NDArray[np.float32] | None:
        """A parameter of the model, though the checkpoint may leave out the path's first parts.

        ``None`` when the checkpoint has none of its own for it, or more than one tensor fits.
        """
        key = self._key(path)
        return None if key is None else self.weight(key)

    def shape(self, path: str) -> tuple[int, ...] | None:
        """Shape of a parameter, found as :meth:`parameter` finds it; its values are not read."""
        key = self._key(path)
        return None if key is None else _records(self._files())[key].shape

    def _key(self, path: str) -> str | None:
        keys = self.keys()
        fitting = [path] if path in keys else [k for k in keys if path.endswith(f".{k}")]
        return fitting[0] if len(fitting) == 1 else None

    def fingerprint(self) -> str:
        """sha256 over every tensor's name, dtype, shape and bytes; independent of the sharding.

        The fingerprint identifies the weights that an adapter was trained on, so it does not
        depend on file names, metadata or the order of the tensors in their files.
        """
        return _fingerprint(self._files())

    def _files(self) -> tuple[_File, ...]:
        files = _weight_files(self.directory)
        return tuple(_File(file, file.stat().st_mtime_ns) for file in files)


def _weight_files(directory: Path) -> list[Path]:
    """The files that transformers takes the weights from: one, or those that an index names.

    Others beside them (``consolidated.safetensors``) are no part of the base.

    Raises:
        BaseModelError: the index is damaged, or names a file that is not there.
    """
    single, index = directory / _SINGLE_FILE, directory / _INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        return sorted(directory.glob("*.safetensors"))
    hint = "Download the whole checkpoint again."
    shards = read_object(index, BaseModelError, hint).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(x, str) for x in shards.values()):
        raise BaseModelError(f"{index}: weight_map is no table of tensors and their files", hint)
    names = sorted(set(shards.values()))
    files = [path_inside(directory, x, f"{index}: a file", BaseModelError, hint) for x in names]
    for file in files:
        if not file.is_file():
            raise BaseModelError(f"{index} names {file.name}, which is not there", hint)
    return files


def resolve_base(name_or_path: str | os.PathLike[str]) -> Base:
    """Find a base model: a local folder, or else a hub id that is downloaded or found in the cache.

    Raises:
        BaseModelError: no such folder or hub id; no config.json; no safetensors; an adapter.
        MissingDependencyError: a hub id is given and ``huggingface_hub`` is not installed.
    """
    name = checked_path("base", name_or_path)
    directory = Path(name)
    if not directory.is_dir():
        if not is_hub_id(name):
            raise BaseModelError(
                f"base model {name!r} is not a folder",
                "Give the folder of a Hugging Face model, or a hub id such as ORG/NAME.",
            )
        directory = snapshot(name, _WEIGHT_PATTERNS, "base model", BaseModelError)
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
    config = read_object(config_file, BaseModelError, "Download it again.", nonfinite=True)
    decode(_Config, config, str(config_file), BaseModelError, "Download it again.")
    if not _weight_files(directory):
        raise BaseModelError(
            f"{name} has no safetensors weights",
            "Convert the checkpoint: load it with transformers and save_pretrained() it again.",
        )
    return Base(directory, name, config)


@functools.lru_cache(maxsize=8)
def _records(files: tuple[_File, ...]) -> dict[str, TensorRecord]:
    records: dict[str, TensorRecord] = {}
    for file in files:
        found = read_header(file.path, BaseModelError, "Download or copy the file again.")
        records.update(found)
    return records


@functools.lru_cache(maxsize=8)
def _fingerprint(files: tuple[_File, ...]) -> str:
    digest = hashlib.sha256()
    for key, record in sorted(_records(files).items()):
        digest.update(f"{key}\0{record.dtype}\0{record.shape}\0".encode())
        for chunk in read_bytes(record):
            digest.update(chunk)
    return digest.hexdigest()
