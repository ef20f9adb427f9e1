"""Reading what PEFT's ``save_pretrained`` wrote: the config, the tensors, the trainer's record.

Knows files and keys; what they mean is :mod:`lora_edge.adapter.load`'s affair. Needs no PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from lora_edge.adapter.types import MERGE_FIRST
from lora_edge.errors import AdapterError, UnsupportedAdapterError
from lora_edge.files.json import read_object
from lora_edge.files.safetensors import TensorRecord, read_float32, read_header
from lora_edge.files.schema import FINITE, between, decode
from lora_edge.files.tokenizer import has_vocabulary, read_templates
from lora_edge.names import BASE_LAYER, PeftPart, TextAspect, parse_peft_key

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
TRAINING_FILE = "training.json"
ORIGINAL_CONFIG_FILE = "original_config.json"  # of the adapter that was converted to this LoRA

Tensors = Mapping[PeftPart, Mapping[str, NDArray[np.float32]]]
"""What a tensor is -> path -> the tensor."""

_AGAIN = "Save the adapter again."
_Rank = Annotated[int, between(1, 1 << 20)]
_Alpha = Annotated[float, FINITE]
_Tokens = list[Annotated[int, between(0, 1 << 31)]]
_Names = list[str]


class _Config(TypedDict, total=False):
    """What is read of every adapter's config, with the types of ``peft/config.py``."""

    peft_type: str | None
    task_type: str | None
    base_model_name_or_path: str | None
    revision: str | None
    auto_mapping: dict[str, Any] | None
    peft_version: str | None


class _LoraConfig(TypedDict, total=False):
    """What is read of a LoRA's config, with the types of ``peft/tuners/lora/config.py``."""

    r: _Rank
    lora_alpha: _Alpha
    lora_dropout: _Alpha | None
    bias: str | None
    fan_in_fan_out: bool | None
    inference_mode: bool | None
    use_rslora: bool | None
    use_dora: bool | None
    lora_bias: bool | None
    use_qalora: bool | None
    use_bdlora: Any
    ensure_weight_tying: bool | None
    init_lora_weights: bool | str | None
    target_modules: _Names | str | None
    exclude_modules: _Names | str | None
    target_parameters: _Names | None
    modules_to_save: _Names | None
    layers_to_transform: list[int] | int | None
    layers_pattern: _Names | str | None
    rank_pattern: dict[str, _Rank] | None
    alpha_pattern: dict[str, _Alpha] | None
    trainable_token_indices: _Tokens | dict[str, _Tokens] | None
    alora_invocation_tokens: _Tokens | None
    layer_replication: list[Any] | None


class _Data(TypedDict, total=False):
    kind: str


class _Training(TypedDict, total=False):
    """What is read of the trainer's record beside an adapter."""

    base_fingerprint: str | None
    labels: list[str] | None
    data: _Data


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
    config = read_object(file, AdapterError, _AGAIN, nonfinite=True)
    decode(_Config, config, str(file), AdapterError, _AGAIN)
    if config.get("peft_type") == "LORA":
        decode(_LoraConfig, config, str(file), AdapterError, _AGAIN)
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
    record = read_object(file, AdapterError, hint, nonfinite=True)
    decode(_Training, record, str(file), AdapterError, hint)
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
    empty = [key for key, record in records.items() if 0 in record.shape]
    if empty:
        raise AdapterError(
            f"{file}: {len(empty)} of {len(records)} tensors are empty, e.g. {empty[0]} of shape "
            f"{list(records[empty[0]].shape)}: saved under ZeRO-3 (or FSDP) without gathering",
            "Gather the weights when saving: stage3_gather_16bit_weights_on_model_save of "
            "DeepSpeed, or its zero_to_fp32.py on the checkpoint.",
        )
    parsed_keys = {key: parse_peft_key(key) for key in records}
    unknown = [key for key, parsed in parsed_keys.items() if parsed is None]
    if unknown:
        many = f"{len(unknown)} tensors are" if len(unknown) > 1 else f"tensor {unknown[0]!r} is"
        example = f" (one is {unknown[0]!r})" if len(unknown) > 1 else ""
        raise UnsupportedAdapterError(
            f"{file} is refused in both modes: {many} of a kind that this release does not know"
            f"{example}, and dropping it would change the adapter",
            MERGE_FIRST,
        )
    found: dict[PeftPart, dict[str, NDArray[np.float32]]] = {}
    for key, record in records.items():
        parsed = parsed_keys[key]
        assert parsed is not None
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


def tensor_keys(file: Path) -> tuple[str, ...]:
    """The keys of an adapter's tensors.

    Raises:
        AdapterError: the file is damaged.
    """
    return tuple(_records(file))


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


def text_aspects(folder: Path) -> tuple[TextAspect, ...]:
    """What an adapter's folder holds that has to do with text, equal to the base's or not.

    Raises:
        BundleError: a file cannot be read.
    """
    found: list[TextAspect] = ["tokenizer"] if has_vocabulary(folder) else []
    return (*found, "chat_template") if read_templates(folder) else tuple(found)
