"""Reading what PEFT's ``save_pretrained`` wrote: the config, the tensors, the trainer's record.

Knows files and keys; what they mean is :mod:`lora_edge.adapter`'s affair. Needs no PyTorch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.errors import AdapterError, UnsupportedAdapterError
from lora_edge.files.safetensors import TensorRecord, read_float32, read_header
from lora_edge.names import BASE_LAYER, PeftPart, parse_peft_key
from lora_edge.peft_types import MERGE_FIRST

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
TRAINING_FILE = "training.json"
ORIGINAL_CONFIG_FILE = "original_config.json"  # of the adapter that was converted to this LoRA

Tensors = Mapping[PeftPart, Mapping[str, NDArray[np.float32]]]
"""What a tensor is -> path -> the tensor."""


def read_config(directory: Path) -> dict[str, Any]:
    """``adapter_config.json``.

    Raises:
        AdapterError: the folder or the file is missing or damaged.
    """
    file = directory / CONFIG_FILE
    if not file.is_file():
        if not directory.is_dir():
            raise AdapterError(
                f"adapter {directory} is not a folder", "Give the folder that PEFT saved."
            )
        nested = sorted(child.parent.name for child in directory.glob(f"*/{CONFIG_FILE}"))
        if nested:
            raise AdapterError(
                f"{directory} holds several saved adapters: {', '.join(nested)}",
                f"Give one of them, e.g. {directory / nested[0]}",
            )
        raise AdapterError(
            f"{directory} has no {CONFIG_FILE}",
            "Give the folder that PEFT's save_pretrained wrote.",
        )
    config = _read_json(file, "Save the adapter again.")
    if not isinstance(config, dict):
        raise AdapterError(f"{file} is not a JSON object", "Save the adapter again.")
    return config


def read_training(directory: Path) -> dict[str, Any]:
    """The trainer's record, ``training.json``; empty where there is none.

    Raises:
        AdapterError: the file is damaged.
    """
    file = directory / TRAINING_FILE
    if not file.is_file():
        return {}
    hint = "Remove it, or copy the adapter again."
    record = _read_json(file, hint)
    if not isinstance(record, dict):
        raise AdapterError(f"{file} is not a JSON object", hint)
    return record


def tensor_file(directory: Path) -> Path:
    """The safetensors file of an adapter.

    Raises:
        UnsupportedAdapterError: there is a pickle only.
        AdapterError: there is none.
    """
    file = directory / TENSOR_FILE
    if file.is_file():
        return file
    pickle = directory / "adapter_model.bin"
    if pickle.is_file():
        raise UnsupportedAdapterError(
            f"{pickle} is a pickle, which can run code when it is loaded",
            "Convert it where you trust it: PeftModel.from_pretrained(...) and "
            "save_pretrained(..., safe_serialization=True).",
        )
    raise AdapterError(f"{directory} has no {TENSOR_FILE}", "Save the adapter again with PEFT.")


def read_tensors(file: Path) -> Tensors:
    """Every tensor of an adapter, by what it is.

    Raises:
        AdapterError: the file is damaged or empty; NaN or Inf.
        UnsupportedAdapterError: a tensor is of a kind that is not known here.
    """
    records = _records(file)
    found: dict[PeftPart, dict[str, NDArray[np.float32]]] = {}
    for key, record in records.items():
        parsed = parse_peft_key(key)
        if parsed is None:
            raise UnsupportedAdapterError(
                f"{file} is refused in both modes: tensor {key!r} is of a kind that this release "
                "does not know, and dropping it would change the adapter",
                MERGE_FIRST,
            )
        tensor = _read(file, key, record)
        twin = found.setdefault(parsed.part, {}).setdefault(parsed.path, tensor)
        if not np.array_equal(twin, tensor):
            raise AdapterError(
                f"{file}: {key} and another tensor hold different values for {parsed.path}",
                "Save the adapter again with PEFT.",
            )
    if not found:
        raise AdapterError(f"{file} holds no tensors", "Save the adapter again with PEFT.")
    return found


def unknown_keys(file: Path) -> list[str]:
    """The keys of an adapter's tensors that :func:`read_tensors` refuses.

    Raises:
        AdapterError: the file is damaged.
    """
    return [key for key in _records(file) if parse_peft_key(key) is None]


def plain_biases(file: Path) -> dict[str, str]:
    """Module path -> key, of each trained bias that is saved beside no wrapper of PEFT's."""
    found = {}
    for key in _records(file):
        parsed = parse_peft_key(key)
        if parsed is not None and parsed.part == "saved" and BASE_LAYER not in key:
            module, _, own = parsed.path.rpartition(".")
            if own == "bias":
                found[module] = key
    return found


def _records(file: Path) -> dict[str, TensorRecord]:
    return read_header(file, AdapterError, "Copy the adapter again.")


def _read(file: Path, key: str, record: TensorRecord) -> NDArray[np.float32]:
    try:
        tensor = read_float32(record)
    except ValueError as error:
        raise AdapterError(f"{file}: {key}: {error}", "Save the adapter in fp32.") from error
    if not np.isfinite(tensor).all():
        bad = int(tensor.size - np.isfinite(tensor).sum())
        raise AdapterError(
            f"{file}: tensor {key!r} has {bad} values that are NaN or Inf",
            "The training diverged; use an earlier checkpoint.",
        )
    return tensor


def _read_json(file: Path, hint: str) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} cannot be read: {error}", hint) from error
