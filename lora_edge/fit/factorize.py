"""The PyTorch side of a conversion: PEFT factorizes each layer's delta, and the result is measured.

PEFT's part is ``peft/tuners/lora/conversion.py``: a truncated SVD; MiSS is a low-rank pair already.
What this module adds: nothing is dropped in silence, and the error is measured on what the layers
*do*, not on the deltas that PEFT computes for its own SVD.
"""

from __future__ import annotations

import dataclasses
import shutil
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, convert_to_lora, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora_edge.adapter.directory import (
    CONFIG_FILE,
    ORIGINAL_CONFIG_FILE,
    TENSOR_FILE,
    TRAINING_FILE,
    read_config,
    tensor_file,
)
from lora_edge.adapter.targets import check_patterns
from lora_edge.adapter.types import MERGE_FIRST
from lora_edge.base.checkpoint import Base
from lora_edge.base.linear import is_linear
from lora_edge.base.model import load_model
from lora_edge.errors import AdapterError, MissingDependencyError, UnsupportedAdapterError
from lora_edge.tasks.task import TEXT

_ROWS = 1024  # of the identity, at a time: bounds the memory that measuring takes
_PREFIX = "base_model.model."


def factorize(
    source: Path, config: Mapping[str, Any], base: Base, rank: int | float, stage: Path
) -> tuple[dict[str, int], dict[str, float]]:
    """Write the LoRA that approximates an adapter into ``stage``.

    Args:
        source: the adapter's PEFT directory.
        config: its config.
        base: its base model.
        rank: a rank, or the share of each delta's energy to keep.
        stage: an empty folder.

    Returns:
        Module path -> rank, and module path -> ``‖ΔW_lora − ΔW‖ / ‖ΔW‖``.

    Raises:
        AdapterError, UnsupportedAdapterError, BaseModelError, MissingDependencyError: as
            :func:`lora_edge.fit.convert.convert` says.
    """
    _refuse_unknown_fields(source, config)
    plain = load_model(base, None, TEXT)
    before = {
        path: _checksum(module.weight)
        for path, module in plain.named_modules()
        if is_linear(module)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT warns of is refused below
        model = _attach(plain, source)
        held = load_file(tensor_file(source))
        carried = _refuse_dropped(source, model, held)
        layers = _layers(source, model, rank)
        for path, layer in layers.items():
            if _checksum(layer.get_base_layer().weight) != before[path]:
                raise UnsupportedAdapterError(
                    f"{source} is refused: loading it changes the base's own weight of {path}",
                    MERGE_FIRST,
                )
        try:
            lora, converted = convert_to_lora(model, rank)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UnsupportedAdapterError(
                f"{source}: peft cannot convert it: {_line(error)}", MERGE_FIRST
            ) from error
    tensors = {}
    for path in layers:
        for part in ("A", "B"):
            key = f"{_PREFIX}{path}.lora_{part}.weight"
            if key not in converted:
                raise UnsupportedAdapterError(
                    f"{source} is refused: peft's conversion drops {path}", MERGE_FIRST
                )
            tensors[key] = converted[key]
    # PEFT's conversion names these wrongly where a saved module has parts of its own.
    tensors |= {key: held[key] for key in carried}
    errors = {}
    with torch.no_grad():
        for path, layer in layers.items():
            a, b = (tensors[f"{_PREFIX}{path}.lora_{part}.weight"].double() for part in "AB")
            errors[path] = _error(source, path, layer, a, b)
    # Every layer by its full name: PEFT keeps the suffixes and drops exclude_modules.
    lora.target_modules = sorted(layers)
    lora.exclude_modules = lora.layers_pattern = lora.layers_to_transform = None
    lora.modules_to_save = sorted(lora.modules_to_save) if lora.modules_to_save else None
    lora.task_type, lora.revision = config.get("task_type"), config.get("revision")
    lora.base_model_name_or_path = config.get("base_model_name_or_path")
    lora.inference_mode = True
    save_file(tensors, stage / TENSOR_FILE)
    lora.save_pretrained(str(stage))
    shutil.copyfile(source / CONFIG_FILE, stage / ORIGINAL_CONFIG_FILE)
    if (source / TRAINING_FILE).is_file():
        shutil.copyfile(source / TRAINING_FILE, stage / TRAINING_FILE)
    ranks = {
        path: int(tensors[f"{_PREFIX}{path}.lora_A.weight"].shape[0]) for path in sorted(layers)
    }
    return ranks, {path: errors[path] for path in sorted(errors)}


def _refuse_unknown_fields(source: Path, config: Mapping[str, Any]) -> None:
    """PEFT drops the fields that it does not know, with a warning only."""
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(config["peft_type"])
    if known is None:
        raise MissingDependencyError(
            f"the installed peft does not know adapters of type {config['peft_type']}",
            "Install a newer one with: pip install -U peft",
        )
    fields = {field.name for field in dataclasses.fields(known)}
    for field, value in config.items():
        if field not in fields and value:
            raise UnsupportedAdapterError(
                f"{source} is refused: the config field {field} is {value!r}, and the installed "
                f"peft does not know it for adapters of type {config['peft_type']}",
                "Update peft, or set the field to its default if it does not matter.",
            )


def _attach(plain: Any, source: Path) -> Any:
    check_patterns(read_config(source), [path for path, _ in plain.named_modules()])
    try:
        return PeftModel.from_pretrained(plain, str(source), torch_device="cpu").eval()
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RuntimeError,
        ImportError,
        SafetensorError,
    ) as error:
        raise AdapterError(
            f"{source}: peft cannot load it: {_line(error)}", "Is this the adapter's own base?"
        ) from error


def _refuse_dropped(source: Path, model: Any, held: Mapping[str, Any]) -> list[str]:
    """Check that the model holds what the file holds; the keys of saved modules."""
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    # PEFT writes these over the base's weights, which are checked by themselves.
    dropped = [key for key in held if key not in loaded and not key.endswith(".base_layer.weight")]
    made_up = [key for key in loaded if key not in held]
    if dropped:
        raise UnsupportedAdapterError(
            f"{source} is refused: {len(dropped)} of its tensors are no part of what peft loads, "
            f"e.g. {dropped[0]!r}, and dropping them would change the adapter",
            "Is this the adapter's own base? Otherwise save the adapter again with PEFT.",
        )
    if made_up:
        raise AdapterError(
            f"{source} lacks {len(made_up)} of its tensors, e.g. {made_up[0]!r}",
            "Is this the adapter's own base? Otherwise save the adapter again with PEFT.",
        )
    carried = []
    for name, module in model.named_modules():
        if not isinstance(module, AuxiliaryTrainingWrapper):
            continue
        if not isinstance(module, ModulesToSaveWrapper):
            raise UnsupportedAdapterError(
                f"{source} is refused: {name.removeprefix(_PREFIX)} has a "
                f"{type(module).__name__}, which a conversion to LoRA would drop",
                MERGE_FIRST,
            )
        carried += [key for key in held if key.startswith(f"{name}.")]
    return carried


def _layers(source: Path, model: Any, rank: int | float) -> dict[str, Any]:
    """Module path -> adapted layer, each of which can be converted."""
    found = {
        name.removeprefix(_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    if not found:
        raise AdapterError(f"{source} changes no layer", "Is this the adapter's own base?")
    for path, layer in found.items():
        inner = layer.get_base_layer()
        if not is_linear(inner) or not layer.supports_lora_conversion("default"):
            raise UnsupportedAdapterError(
                f"{source} is refused: it changes {path}, a {type(inner).__name__}, where peft "
                f"cannot convert adapters of type {model.peft_config['default'].peft_type.value}",
                MERGE_FIRST,
            )
        largest = min(inner.weight.shape)
        if isinstance(rank, int) and rank > largest and not _is_low_rank(layer):
            raise AdapterError(
                f"{source}: rank {rank} is above the largest that {path} can have, {largest}",
                f"Use --convert {largest} or less, or the share of the energy to keep, such as "
                "--convert 0.9999.",
            )
    return found


def _is_low_rank(layer: Any) -> bool:
    """Whether a layer's delta is a low-rank pair already: PEFT then keeps its rank."""
    return getattr(layer, "miss_fn", "bat") != "bat"


def _error(source: Path, path: str, layer: Any, a: Any, b: Any) -> float:
    """``‖BA − ΔW‖ / ‖ΔW‖``, where ΔW is what the unmerged layer adds to the base's output.

    Args:
        source: the adapter, for messages.
        path: the module path, for messages.
        layer: PEFT's layer; left in float32.
        a: ``[r, in] float64``.
        b: ``[out, r] float64``.
    """
    inner = layer.get_base_layer()
    missed = whole = 0.0
    layer.double()
    try:
        size = a.shape[1]
        zero = torch.zeros(1, 1, size, dtype=torch.float64)
        if bool((layer(zero) != inner(zero)).any()):
            raise UnsupportedAdapterError(
                f"{source} is refused: it changes the bias of {path}, which a conversion to LoRA "
                "would drop",
                MERGE_FIRST,
            )
        identity = torch.eye(size, dtype=torch.float64)
        for start in range(0, size, _ROWS):
            rows = identity[None, start : start + _ROWS]
            added = layer(rows) - inner(rows)  # [1, rows, out]: these columns of ΔW
            made = (b @ a[:, start : start + _ROWS]).T
            whole += float((added**2).sum())
            missed += float(((added[0] - made) ** 2).sum())
    finally:
        layer.float()
    if whole == 0.0 and missed == 0.0:
        return 0.0
    error = (missed / whole) ** 0.5 if whole else float("inf")
    if not error < float("inf"):
        raise AdapterError(
            f"{source}: the delta of {path} has values that are NaN or Inf, or peft's conversion "
            "of it is not zero where the adapter is",
            "The training diverged; use an earlier checkpoint.",
        )
    return error


def _checksum(weight: Any) -> int:
    return zlib.crc32(weight.detach().contiguous().numpy())


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or repr(error)
