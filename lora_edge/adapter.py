"""A PEFT directory -> :class:`Adapter`, or a refusal by name.

Everything is driven by the tensors' keys and shapes; the config says the scale and the kind. What
this module does not understand, in the config or in the tensors, it refuses: an adapter that loads
and is silently wrong is worse than one that does not load. Needs no PyTorch and no peft.

Sources: ``peft/tuners/lora/config.py`` for the fields, ``peft/utils/other.py:get_pattern_key`` for
the pattern matching, ``peft/tuners/lora/layer.py:update_layer`` for the scaling.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.errors import AdapterError, UnsupportedAdapterError
from lora_edge.lora import Factors, fold, scaling
from lora_edge.names import NONE_ADAPTER, parse_peft_key
from lora_edge.peft_types import MERGE_FIRST
from lora_edge.refusals import config_refusals, tensor_refusal
from lora_edge.tensors import read_float32, read_header

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
TRAINING_FILE = "training.json"
ORIGINAL_CONFIG_FILE = "original_config.json"  # of the adapter that was converted to this LoRA

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class LoraModule:
    """One adapted linear layer, in PEFT's orientation.

    Attributes:
        path: module path in the base model.
        a: ``lora_A`` ``[r, in] float32``.
        b: ``lora_B`` ``[out, r] float32``.
        alpha: the alpha that applies to this module.
        scaling: the factor on ``b @ a``.
    """

    path: str
    a: NDArray[np.float32]
    b: NDArray[np.float32]
    alpha: float
    scaling: float

    @property
    def rank(self) -> int:
        """r, the number of rows of a."""
        return int(self.a.shape[0])

    @property
    def in_features(self) -> int:
        """Size of the layer's input."""
        return int(self.a.shape[1])

    @property
    def out_features(self) -> int:
        """Size of the layer's output."""
        return int(self.b.shape[0])

    def factors(self) -> Factors:
        """The pair in the graph's orientation, the scaling folded into B in fp32."""
        return fold(self.a, self.b, self.scaling)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, read and understood completely.

    Attributes:
        name: what the user calls it.
        directory: the PEFT directory.
        config: ``adapter_config.json``.
        kind: ``LoRA`` or ``rsLoRA``.
        modules: module path -> factors and scale, sorted by path.
        base_model: ``base_model_name_or_path`` of the config.
        base_fingerprint: fingerprint of the base it was trained on, when the trainer recorded it.
        digest: sha256 over config and tensors.
        warnings: things that are right but worth a look.
    """

    name: str
    directory: Path
    config: Mapping[str, Any]
    kind: str
    modules: Mapping[str, LoraModule]
    base_model: str | None
    base_fingerprint: str | None
    digest: str
    warnings: tuple[str, ...]

    def ranks(self) -> dict[str, int]:
        """Rank per module path."""
        return {path: module.rank for path, module in self.modules.items()}


def check_name(name: str) -> str:
    """Return ``name`` if it can name an adapter in a bundle.

    Raises:
        AdapterError: it is reserved, or has characters that a folder name should not have.
    """
    if name == NONE_ADAPTER:
        raise AdapterError(
            f"the adapter name {name!r} is reserved for the base", "Choose another name."
        )
    if _NAME.fullmatch(name) is None:
        raise AdapterError(
            f"{name!r} cannot name an adapter",
            "Use 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit.",
        )
    return name


def load_adapter(path: str | os.PathLike[str], name: str | None = None) -> Adapter:
    """Read a PEFT directory.

    Args:
        path: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: what to call it; the folder's name when omitted.

    Raises:
        AdapterError: the folder or a file is missing or damaged; a key or pattern matches nothing;
            shapes or ranks contradict each other; NaN or Inf.
        UnsupportedAdapterError: the adapter carries something that would not be exported exactly.
    """
    directory = Path(path)
    config = _read_config(directory)
    _refuse_config(directory, config)
    tensor_file = _tensor_file(directory)
    factors = _read_factors(tensor_file)
    modules, warnings = _modules(directory, config, factors)
    digest = hashlib.sha256()
    for file in (directory / CONFIG_FILE, tensor_file):
        digest.update(file.read_bytes())
    return Adapter(
        name=check_name(name if name is not None else directory.resolve().name),
        directory=directory,
        config=config,
        kind="rsLoRA" if config.get("use_rslora") else "LoRA",
        modules=modules,
        base_model=config.get("base_model_name_or_path"),
        base_fingerprint=_base_fingerprint(directory),
        digest=digest.hexdigest(),
        warnings=warnings,
    )


def refusals(path: str | os.PathLike[str]) -> list[str]:
    """Everything for which :func:`load_adapter` would refuse the adapter, one line each.

    Raises:
        AdapterError: the folder has no readable config.
    """
    directory = Path(path)
    config = _read_config(directory)
    found = [message for message, _ in config_refusals(config)]
    tensor_file = directory / TENSOR_FILE
    if tensor_file.is_file():
        try:
            keys: Iterable[str] = read_header(tensor_file)
        except ValueError as error:
            return [*found, str(error)]
        found += [tensor_refusal(key) for key in keys if parse_peft_key(key) is None]
    if not found:
        try:
            load_adapter(directory, "adapter")
        except AdapterError as error:
            found.append(str(error))
    return found


def _read_config(directory: Path) -> dict[str, Any]:
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
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} cannot be read: {error}", "Save the adapter again.") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{file} is not a JSON object", "Save the adapter again.")
    return config


def _refuse_config(directory: Path, config: Mapping[str, Any]) -> None:
    for message, hint in config_refusals(config):
        raise UnsupportedAdapterError(f"{directory} is refused: {message}", hint)


def _tensor_file(directory: Path) -> Path:
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


def _read_factors(file: Path) -> dict[str, dict[str, NDArray[np.float32]]]:
    try:
        records = read_header(file)
    except ValueError as error:
        raise AdapterError(str(error), "Copy the adapter again.") from error
    factors: dict[str, dict[str, NDArray[np.float32]]] = {}
    for key, record in records.items():
        parsed = parse_peft_key(key)
        if parsed is None:
            raise UnsupportedAdapterError(
                f"{file} is refused: {tensor_refusal(key)}, and dropping it would change the "
                "adapter",
                MERGE_FIRST,
            )
        path, part = parsed
        if len(record.shape) != 2:
            raise UnsupportedAdapterError(
                f"{file} is refused: tensor {key!r} has shape {record.shape}; only linear layers "
                "(2-D factors) are supported",
                MERGE_FIRST,
            )
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
        factors.setdefault(path, {})[part] = tensor
    if not factors:
        raise AdapterError(f"{file} holds no LoRA factors", "Save the adapter again with PEFT.")
    return factors


def _modules(
    directory: Path,
    config: Mapping[str, Any],
    factors: Mapping[str, Mapping[str, NDArray[np.float32]]],
) -> tuple[dict[str, LoraModule], tuple[str, ...]]:
    rank_pattern: Mapping[str, int] = config.get("rank_pattern") or {}
    alpha_pattern: Mapping[str, float] = config.get("alpha_pattern") or {}
    unused = {("rank_pattern", key) for key in rank_pattern}
    unused |= {("alpha_pattern", key) for key in alpha_pattern}
    modules: dict[str, LoraModule] = {}
    for path in sorted(factors):
        missing = {"A", "B"} - set(factors[path])
        if missing:
            raise AdapterError(
                f"{directory}: module {path} has no lora_{missing.pop()}", "Save the adapter again."
            )
        a, b = factors[path]["A"], factors[path]["B"]
        if a.shape[0] != b.shape[1]:
            raise AdapterError(
                f"{directory}: module {path}: lora_A is {a.shape}, lora_B is {b.shape}; "
                "their ranks differ",
                "Save the adapter again with PEFT.",
            )
        rank_key = _first_match(rank_pattern, path)
        alpha_key = _first_match(alpha_pattern, path)
        unused -= {("rank_pattern", rank_key), ("alpha_pattern", alpha_key)}
        rank = _number(rank_pattern[rank_key] if rank_key is not None else config.get("r", 8), "r")
        if rank != a.shape[0]:
            raise AdapterError(
                f"{directory}: module {path} has rank {a.shape[0]}, but the config says {rank:g}",
                "The config and the tensors are from different adapters; save it again.",
            )
        alpha = _number(
            alpha_pattern[alpha_key] if alpha_key is not None else config.get("lora_alpha", 8),
            "lora_alpha",
        )
        scale = scaling(alpha, a.shape[0], rslora=bool(config.get("use_rslora")))
        modules[path] = LoraModule(path, a, b, alpha, scale)
    if unused:
        field, key = sorted(unused)[0]
        raise AdapterError(
            f"{directory}: {field} has the key {key!r}, which decides for none of the adapter's "
            f"{len(modules)} modules (one is {next(iter(modules))})",
            f"Correct or remove the key in {CONFIG_FILE}; PEFT ignores it in silence.",
        )
    dead = [path for path, module in modules.items() if not module.b.any() or not module.a.any()]
    warnings: tuple[str, ...] = ()
    if len(dead) == len(modules):
        warnings = ("all its factors B (or A) are zero: the adapter changes nothing",)
    elif dead:
        warnings = (f"{len(dead)} of {len(modules)} modules are zero, e.g. {dead[0]}",)
    return modules, warnings


def _number(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(
            f"{CONFIG_FILE}: {field} is {value!r}, expected a number", "Save the adapter again."
        )
    return float(value)


def _first_match(pattern: Mapping[str, Any], path: str) -> str | None:
    for key in pattern:
        try:
            if re.match(rf"(.*\.)?({key})$", path):
                return key
        except re.error as error:
            raise AdapterError(
                f"the pattern key {key!r} is not a regular expression: {error}",
                f"Correct it in {CONFIG_FILE}.",
            ) from error
    return None


def _base_fingerprint(directory: Path) -> str | None:
    file = directory / TRAINING_FILE
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8")).get("base_fingerprint")
    except (OSError, ValueError, AttributeError) as error:
        raise AdapterError(
            f"{file} cannot be read: {error}", "Remove it, or copy the adapter again."
        ) from error
    return str(value) if value else None
