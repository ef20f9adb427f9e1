"""An adapter of MLX-LM as the PEFT directory that does the same, exactly.

``mlx_lm.lora`` writes ``adapters.safetensors`` and ``adapter_config.json`` with ``fine_tune_type``
(``mlx_lm/tuner/lora.py``, ``dora.py``): ``y = xWᵀ + scale · (x A) B`` with ``lora_a [in, r]`` and
``lora_b [r, out]``, which are PEFT's factors transposed; DoRA's ``m`` is its magnitude. Knows files
and keys; needs neither MLX nor PyTorch.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.errors import AdapterError, UnsupportedAdapterError
from lora_edge.files.json import read_object
from lora_edge.files.safetensors import read_float32, read_header
from lora_edge.names import PEFT_PREFIX

MLX_FILE = "adapters.safetensors"
_CONFIG_FILE = "adapter_config.json"
_TENSOR_FILE = "adapter_model.safetensors"
_AGAIN = "Copy the adapter again."
_KEY = re.compile(r"(?P<path>.+)\.(?P<part>lora_a|lora_b|m)")
_FUSE = "Fuse it with mlx_lm.fuse --de-quantize, and export the result as a base."


def is_mlx(directory: Path) -> bool:
    """Whether a folder holds an adapter of MLX-LM, and none of PEFT."""
    return (directory / MLX_FILE).is_file() and not (directory / _TENSOR_FILE).is_file()


def mlx_as_peft(source: Path, target: Path) -> None:
    """Write an adapter of MLX-LM as a PEFT directory.

    Args:
        source: the folder that MLX-LM wrote.
        target: an existing, empty folder.

    Raises:
        AdapterError: a file is damaged, or the two contradict each other.
        UnsupportedAdapterError: it is no LoRA or DoRA of linear layers.
    """
    config = read_object(source / _CONFIG_FILE, AdapterError, _AGAIN)
    kind, scale = _kind_and_scale(source, config)
    pairs: dict[str, dict[str, NDArray[np.float32]]] = {}
    for key, record in read_header(source / MLX_FILE, AdapterError, _AGAIN).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UnsupportedAdapterError(
                f"{source} is an adapter of MLX-LM with the tensor {key!r}, which is no factor of "
                "a LoRA",
                _FUSE,
            )
        pairs.setdefault(match["path"], {})[match["part"]] = read_float32(record)
    tensors: dict[str, NDArray[np.float32]] = {}
    ranks = set()
    for path, parts in pairs.items():
        wanted = {"lora_a", "lora_b", *(["m"] if kind == "dora" else [])}
        a, b = parts.get("lora_a"), parts.get("lora_b")
        if set(parts) != wanted or a is None or b is None:
            raise AdapterError(
                f"{source}: {path} has {', '.join(sorted(parts))}, expected "
                f"{', '.join(sorted(wanted))} of an adapter of MLX-LM ({kind})",
                _AGAIN,
            )
        if a.ndim != 2 or b.ndim != 2 or path.rpartition(".")[2].startswith("embed"):
            raise UnsupportedAdapterError(
                f"{source} is an adapter of MLX-LM on {path}, which is an embedding or a stack of "
                "experts; only linear layers are converted",
                _FUSE,
            )
        if a.shape[1] != b.shape[0]:
            raise AdapterError(
                f"{source}: {path}: lora_a is {a.shape}, lora_b is {b.shape}; their ranks differ",
                _AGAIN,
            )
        ranks.add(a.shape[1])
        tensors[f"{PEFT_PREFIX}{path}.lora_A.weight"] = a.T
        tensors[f"{PEFT_PREFIX}{path}.lora_B.weight"] = b.T
        if "m" in parts:
            tensors[f"{PEFT_PREFIX}{path}.lora_magnitude_vector"] = parts["m"].reshape(-1)
    if len(ranks) != 1:
        raise AdapterError(
            f"{source} is an adapter of MLX-LM with {len(ranks)} ranks, expected one", _AGAIN
        )
    (rank,) = ranks
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.get("model"),
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": sorted(pairs),
        "use_dora": kind == "dora",
        "inference_mode": True,
    }
    (target / _CONFIG_FILE).write_text(json.dumps(written, indent=1), encoding="utf-8")
    _write(target / _TENSOR_FILE, tensors)


def _kind_and_scale(source: Path, config: Mapping[str, Any]) -> tuple[str, float]:
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UnsupportedAdapterError(
            f"{source} is an adapter of MLX-LM, and fine_tune_type is {kind!r}", _FUSE
        )
    settings = config.get("lora_parameters")
    scale = settings.get("scale") if isinstance(settings, Mapping) else None
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not isinstance(settings, Mapping) or not number or "alpha" in settings:
        raise UnsupportedAdapterError(
            f"{source} is an adapter of MLX-LM, and its lora_parameters are {settings!r}, of which "
            "the scale of its factors does not follow",
            _FUSE,
        )
    assert scale is not None
    if not math.isfinite(scale):
        raise AdapterError(f"{source}: scale is {scale}, expected a finite number", _AGAIN)
    return kind, float(scale)


def _write(file: Path, tensors: Mapping[str, NDArray[np.float32]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in sorted(tensors):
        begin, end = end, end + tensors[key].nbytes
        shape = list(tensors[key].shape)
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for key in sorted(tensors):
            stream.write(np.ascontiguousarray(tensors[key], "<f4").tobytes())
