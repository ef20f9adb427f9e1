"""The tensors of a PEFT directory -> low-rank pairs, saved parameters, token rows.

Driven by keys and shapes; the config says scale and kind. Whatever contradicts it is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lora_edge.adapter.directory import CONFIG_FILE, Tensors, plain_biases
from lora_edge.adapter.parts import LowRank, StackedFactors, TokenRows
from lora_edge.adapter.targets import Targets, pattern_key
from lora_edge.adapter.types import MERGE_FIRST
from lora_edge.errors import AdapterError, UnsupportedAdapterError
from lora_edge.maths.experts import split_level
from lora_edge.maths.lora import FloatArray, scaling
from lora_edge.names import PeftPart

_LARGEST = float(np.finfo(np.float32).max)

_Pair = tuple[Literal["linear", "embedding", "conv"], FloatArray, FloatArray]

_PAIRS: tuple[tuple[PeftPart, PeftPart], ...] = (("A", "B"), ("embedding_A", "embedding_B"))


def stacked_factors(
    directory: Path, config: Mapping[str, Any], tensors: Tensors
) -> dict[str, StackedFactors]:
    """The factors below the modules that ``target_parameters`` names."""
    wanted = [str(x) for x in config.get("target_parameters") or ()]
    if not wanted:
        return {}
    targets = Targets(config)
    found: dict[str, dict[int, tuple[FloatArray, FloatArray]]] = {}
    for path, (_, a, b) in _pairs(directory, tensors):
        module, level = split_level(path)
        # A target may be the parameter's name alone; PEFT takes no module of target_modules.
        if not (targets.decided and targets.decide(module).hit) and _owned(module, wanted):
            found.setdefault(module, {})[level] = (a, b)
    return {
        module: StackedFactors(
            module,
            levels,
            {
                name: _rank_and_alpha(config, f"{module}.{name}")[:2]
                for name in {x.rpartition(".")[2] for x in wanted if _owned(module, [x])}
            },
            bool(config.get("use_rslora")),
        )
        for module, levels in found.items()
    }


def _owned(module: str, targets: Iterable[str]) -> bool:
    return any(
        not (owner := target.rpartition(".")[0]) or f".{module}".endswith(f".{owner}")
        for target in targets
    )


def _rank_and_alpha(
    config: Mapping[str, Any], path: str
) -> tuple[int, float, set[tuple[str, str | None]]]:
    """Rank and alpha of a module or parameter, and the pattern keys that decided."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank_key, alpha_key = pattern_key(ranks, path), pattern_key(alphas, path)
    rank = _number(ranks[rank_key] if rank_key is not None else config.get("r", 8), "r")
    alpha = _number(
        alphas[alpha_key] if alpha_key is not None else config.get("lora_alpha", 8), "lora_alpha"
    )
    if rank < 1:
        raise AdapterError(
            f"{CONFIG_FILE}: r is {rank:g}, expected 1 or more", "Save the adapter again."
        )
    return int(rank), alpha, {("rank_pattern", rank_key), ("alpha_pattern", alpha_key)}


def low_rank_modules(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    stacked: Mapping[str, StackedFactors],
) -> tuple[dict[str, LowRank], tuple[str, ...]]:
    unused = {
        (field, key)
        for field in ("rank_pattern", "alpha_pattern")
        for key in config.get(field) or ()
    }
    for path, factors in stacked.items():
        for name in factors.alphas:
            unused -= _rank_and_alpha(config, f"{path}.{name}")[2]
    pairs = _pairs(directory, tensors)
    own = {path: pair for path, pair in pairs if split_level(path)[0] not in stacked}
    modules: dict[str, LowRank] = {}
    for path in sorted(own):
        kind, a, b = own[path]
        rank, alpha, keys = _rank_and_alpha(config, path)
        unused -= keys
        if rank != a.shape[0]:
            raise AdapterError(
                f"{directory}: module {path} has rank {a.shape[0]}, but the config says {rank:g}",
                "The config and the tensors are from different adapters; save it again.",
            )
        modules[path] = LowRank(
            path,
            kind,
            a,
            b,
            alpha,
            scaling(alpha, rank, rslora=bool(config.get("use_rslora"))),
            _vector(directory, "lora_magnitude_vector", path, tensors.get("magnitude", {}), b),
            _vector(directory, "lora_B.bias", path, tensors.get("B.bias", {}), b),
        )
        _check_scaling(directory, modules[path])
    _check_extras(directory, config, tensors, modules)
    warnings = [
        f"{field} has the key {key!r}, which decides for none of the adapter's {len(modules)} "
        "modules; PEFT ignores it, and so does the export"
        for field, key in sorted(unused)
    ]
    dead = [path for path, module in modules.items() if not module.changes]
    if dead and len(dead) < len(modules):
        warnings.append(f"{len(dead)} of {len(modules)} modules are zero, e.g. {dead[0]}")
    return modules, tuple(warnings)


def _check_scaling(directory: Path, module: LowRank) -> None:
    """The scaling is folded into B in float32, where what PEFT computes must be finite too."""
    a, b = (max(float(np.abs(x).max(initial=0)), 1.0) for x in (module.a, module.b))
    if not max(abs(module.alpha), abs(module.scaling) * a * b) <= _LARGEST:
        raise AdapterError(
            f"{directory}: module {module.path} has the scaling {module.scaling:.3g} (lora_alpha "
            f"{module.alpha:g}, rank {module.rank}), with which its B is not finite in float32",
            f"Correct lora_alpha in {CONFIG_FILE}.",
        )


def _pairs(directory: Path, tensors: Tensors) -> Iterable[tuple[str, _Pair]]:
    """Each module's kind, a and b (2-D); both must be there and their ranks must agree."""
    for path in tensors.get("A", {}):
        module, wrapped, _ = path.rpartition(".base_layer.out_proj")
        if wrapped:
            raise UnsupportedAdapterError(
                f"{directory} is refused: {module} is an nn.MultiheadAttention, whose projections "
                "are no layers of their own; PEFT adds the change of its out_proj twice",
                MERGE_FIRST,
            )
    for parts in _PAIRS:
        first, second = (tensors.get(part, {}) for part in parts)
        for path in {**first, **second}:
            missing = [
                part for part, side in zip(parts, (first, second), strict=True) if path not in side
            ]
            if missing:
                raise AdapterError(
                    f"{directory}: module {path} has no lora_{missing[0]}",
                    "Save the adapter again.",
                )
            a, b = first[path], second[path]
            kind: Literal["linear", "embedding", "conv"] = "linear"
            if parts[0] == "embedding_A":
                kind = "embedding"
            elif a.ndim > 2:
                kind = "conv"
            flat = b.reshape(b.shape[0], -1)
            groups = a.shape[0] // max(flat.shape[1], 1)
            fits = flat.shape[1] == a.shape[0] or (
                kind == "conv" and flat.shape[1] * groups == a.shape[0] and groups > 0
            )
            if a.ndim < 2 or b.ndim != a.ndim or not fits:
                raise AdapterError(
                    f"{directory}: module {path}: lora_A is {a.shape}, lora_B is {b.shape}; "
                    "their ranks differ",
                    "Save the adapter again with PEFT.",
                )
            yield path, (kind, a, flat)


def _vector(
    directory: Path, what: str, path: str, vectors: Mapping[str, FloatArray], b: FloatArray
) -> FloatArray | None:
    vector = vectors.get(path)
    if vector is None:
        return None
    if vector.size != b.shape[0]:
        raise AdapterError(
            f"{directory}: module {path}: {what} is {vector.shape}, expected [{b.shape[0]}]",
            "Save the adapter again with PEFT.",
        )
    return vector.reshape(-1)


def _check_extras(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    modules: Mapping[str, LowRank],
) -> None:
    """DoRA and ``lora_bias``: the tensors are there where, and only where, the config says so."""
    extras: tuple[tuple[str, PeftPart, str], ...] = (
        ("use_dora", "magnitude", "lora_magnitude_vector"),
        ("lora_bias", "B.bias", "lora_B.bias"),
    )
    for field, part, what in extras:
        held = set(tensors.get(part, {}))
        lost = sorted(held - set(modules))
        if lost:
            raise AdapterError(
                f"{directory}: {what} of {lost[0]} has no factors beside it",
                "Save the adapter again with PEFT.",
            )
        wanted = set(modules) if config.get(field) else set()
        if field == "lora_bias":  # embeddings have no bias
            wanted = {path for path in wanted if modules[path].kind != "embedding"}
        if held != wanted:
            odd = min(held ^ wanted)
            raise AdapterError(
                f"{directory}: {field} is {config.get(field)!r}, but module {odd} "
                f"{'has' if odd in held else 'lacks'} a {what}",
                "The config and the tensors are from different adapters; save it again.",
            )


def check_biases(directory: Path, file: Path, modules: Mapping[str, LowRank]) -> None:
    """A trained bias of an adapted layer has a key that today's PEFT reads too."""
    for path, key in plain_biases(file).items():
        if path in modules:
            raise UnsupportedAdapterError(
                f"{directory} is refused in both modes: the bias {key!r} is saved as old releases "
                "of PEFT did, and today's, which the export is checked against, drops it",
                f"Rename it to {key.removesuffix('bias')}base_layer.bias in {file.name}.",
            )


def saved_parameters(
    config: Mapping[str, Any], tensors: Tensors, modules: Mapping[str, LowRank]
) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """The parameters that replace the base's, and copies of the base's that were saved along."""
    targets = Targets(config)
    bias = config.get("bias", "none")
    saved: dict[str, FloatArray] = {}
    copies = {f"{path}.weight": array for path, array in tensors.get("base", {}).items()}
    for path, array in tensors.get("saved", {}).items():
        module, _, own_name = path.rpartition(".")
        replaces = targets.saves(module) or targets.may_tie(module)
        if own_name == "bias":
            replaces |= bias == "all" or (bias == "lora_only" and module in modules)
        (saved if replaces else copies)[path] = array
    return dict(sorted(saved.items())), copies


def token_rows(
    directory: Path, config: Mapping[str, Any], tensors: Tensors
) -> dict[str, TokenRows]:
    wanted = config.get("trainable_token_indices")
    found: dict[str, TokenRows] = {}
    for path, rows in tensors.get("tokens", {}).items():
        indices = wanted
        if isinstance(wanted, Mapping):
            indices = next((v for k, v in wanted.items() if f".{path}".endswith(f".{k}")), None)
        if not indices or rows.shape[0] != len(indices):
            raise AdapterError(
                f"{directory}: {path} has {rows.shape[0]} trained token rows, but "
                f"trainable_token_indices is {wanted!r}",
                "The config and the tensors are from different adapters; save it again.",
            )
        found[path] = TokenRows(path, tuple(int(index) for index in indices), rows)
    if wanted and not found:
        raise AdapterError(
            f"{directory}: trainable_token_indices is {wanted!r}, but no tensor holds trained rows",
            "Save the adapter again with PEFT.",
        )
    return found


def _number(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(
            f"{CONFIG_FILE}: {field} is {value!r}, expected a number", "Save the adapter again."
        )
    return float(value)
