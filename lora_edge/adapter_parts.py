"""What the tensors of a PEFT directory are: low-rank pairs, saved parameters, token rows.

Driven by keys and shapes; the config says scale and kind. Whatever contradicts it is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lora_edge.errors import AdapterError, UnsupportedAdapterError
from lora_edge.experts import split_level
from lora_edge.lora import Factors, WideArray, dora_gain, fold, scaling, ungrouped
from lora_edge.names import PeftPart
from lora_edge.peft_directory import CONFIG_FILE, Tensors, plain_biases
from lora_edge.peft_types import MERGE_FIRST

FloatArray = NDArray[np.float32]

TASK_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}

_Pair = tuple[Literal["linear", "embedding", "conv"], FloatArray, FloatArray]

_PAIRS: tuple[tuple[PeftPart, PeftPart], ...] = (("A", "B"), ("embedding_A", "embedding_B"))


@dataclass(frozen=True)
class LowRank:
    """The low-rank pair of one module, in PEFT's orientation.

    Attributes:
        path: module path in the base model.
        kind: what the module is: ``linear`` (Conv1D of GPT-2 too), ``embedding`` or ``conv``.
        a: ``[r, in]``; an embedding's ``[r, vocab]``; a convolution's ``[r, channels, *kernel]``.
        b: ``[out, r]``; a convolution's ``[out, r / groups]``.
        alpha: the alpha that applies to this module.
        scaling: the factor on ``b @ a``.
        magnitude: DoRA's m, ``[out]``; ``None`` without DoRA.
        bias: ``lora_bias``'s bias of B, ``[out]``, not scaled; ``None`` without.
    """

    path: str
    kind: Literal["linear", "embedding", "conv"]
    a: FloatArray
    b: FloatArray
    alpha: float
    scaling: float
    magnitude: FloatArray | None = None
    bias: FloatArray | None = None

    @property
    def rank(self) -> int:
        """r, the number of rows of a."""
        return int(self.a.shape[0])

    @property
    def in_features(self) -> int:
        """Size of the input: of a convolution channels * kernel, of an embedding the vocabulary."""
        return math.prod(self.a.shape[1:])

    @property
    def out_features(self) -> int:
        """Size of the layer's output."""
        return int(self.b.shape[0])

    def factors(self) -> Factors:
        """The pair in the graph's orientation, scaling folded into B in fp32; without DoRA."""
        a = self.a.reshape(self.rank, -1)
        b = self.b if self.b.shape[1] == self.rank else ungrouped(self.b, self.rank)
        return fold(a, b, self.scaling)

    def delta(self) -> WideArray:
        """``s BA`` as ``[out, in] float64``, without DoRA."""
        a = self.a.reshape(self.rank, -1).astype(np.float64)
        b = self.b if self.b.shape[1] == self.rank else ungrouped(self.b, self.rank)
        change: WideArray = self.scaling * (b.astype(np.float64) @ a)
        return change

    def gain(self, weight: WideArray) -> WideArray | None:
        """DoRA's g of each output, from the base's ``W``; ``None`` without DoRA.

        Args:
            weight: ``[out, in]``, of a grouped convolution ``[out, in / groups]``, as its kernel.
        """
        if self.magnitude is None:
            return None
        a = self.a.reshape(self.rank, -1).astype(np.float64)
        # PEFT pairs the outputs of a grouped B in its own way, for this norm alone (dora.py).
        change = self.b.reshape(-1, self.rank).astype(np.float64) @ a
        return dora_gain(self.magnitude, weight + self.scaling * change.reshape(weight.shape))


@dataclass(frozen=True)
class TokenRows:
    """Trained rows of an embedding, which replace the base's.

    Attributes:
        path: module path of the embedding (or of an output layer).
        indices: token ids, ``k`` of them.
        rows: ``[k, dim]``.
    """

    path: str
    indices: tuple[int, ...]
    rows: FloatArray


@dataclass(frozen=True)
class StackedFactors:
    """The factors of a module's stacked parameters (``target_parameters``), as PEFT saved them.

    Which of them belongs to which parameter is known when the base is (:mod:`lora_edge.experts`).

    Attributes:
        path: module path, e.g. ``model.layers.0.mlp.experts``.
        levels: how deep the wrapper lies -> ``(A [E * r, in], B [out, r * E])``.
        scaling: the factor on each product.
    """

    path: str
    levels: Mapping[int, tuple[FloatArray, FloatArray]]
    scaling: float


def stacked_factors(
    directory: Path, config: Mapping[str, Any], tensors: Tensors
) -> dict[str, StackedFactors]:
    """The factors below the modules that ``target_parameters`` names."""
    targets = [str(x) for x in config.get("target_parameters") or ()]
    owners = {target.rpartition(".")[0] for target in targets} - {""}
    if not owners:
        return {}
    found: dict[str, dict[int, tuple[FloatArray, FloatArray]]] = {}
    for path, (_, a, b) in _pairs(directory, tensors):
        module, level = split_level(path)
        if any(f".{module}".endswith(f".{owner}") for owner in owners):
            found.setdefault(module, {})[level] = (a, b)
    for field in ("rank_pattern", "alpha_pattern"):
        # PEFT matches the patterns with the parameter's path.
        paths = [f"{module}.{x.rpartition('.')[2]}" for module in found for x in targets]
        for path in (*found, *paths):
            if _first_match(config.get(field) or {}, path) is not None:
                raise UnsupportedAdapterError(
                    f"{directory} is refused in both modes: {field} decides for {path}, "
                    "which target_parameters names",
                    "Train the experts with the adapter's own rank and alpha.",
                )
    rank = _number(config.get("r", 8), "r")
    alpha = _number(config.get("lora_alpha", 8), "lora_alpha")
    scale = scaling(alpha, int(rank), rslora=bool(config.get("use_rslora")))
    return {path: StackedFactors(path, levels, scale) for path, levels in found.items()}


def low_rank_modules(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    stacked: Mapping[str, StackedFactors],
) -> tuple[dict[str, LowRank], tuple[str, ...]]:
    rank_pattern: Mapping[str, int] = config.get("rank_pattern") or {}
    alpha_pattern: Mapping[str, float] = config.get("alpha_pattern") or {}
    unused = {("rank_pattern", key) for key in rank_pattern}
    unused |= {("alpha_pattern", key) for key in alpha_pattern}
    pairs = _pairs(directory, tensors)
    factors = {path: pair for path, pair in pairs if split_level(path)[0] not in stacked}
    modules: dict[str, LowRank] = {}
    for path in sorted(factors):
        kind, a, b = factors[path]
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
        modules[path] = LowRank(
            path,
            kind,
            a,
            b,
            alpha,
            scaling(alpha, a.shape[0], rslora=bool(config.get("use_rslora"))),
            _vector(directory, "lora_magnitude_vector", path, tensors.get("magnitude", {}), b),
            _vector(directory, "lora_B.bias", path, tensors.get("B.bias", {}), b),
        )
    _check_extras(directory, config, tensors, modules)
    if unused:
        field, key = sorted(unused)[0]
        raise AdapterError(
            f"{directory}: {field} has the key {key!r}, which decides for none of the adapter's "
            f"{len(modules)} modules (one is {next(iter(modules), 'none')})",
            f"Correct or remove the key in {CONFIG_FILE}; PEFT ignores it in silence.",
        )
    dead = [path for path, module in modules.items() if not module.b.any() or not module.a.any()]
    warnings: tuple[str, ...] = ()
    if dead and len(dead) == len(modules):
        warnings = ("all its factors B (or A) are zero: they change nothing",)
    elif dead:
        warnings = (f"{len(dead)} of {len(modules)} modules are zero, e.g. {dead[0]}",)
    return modules, warnings


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
    names = [*(config.get("modules_to_save") or ())]
    names += TASK_HEADS.get(str(config.get("task_type")), ())
    bias = config.get("bias", "none")
    saved: dict[str, FloatArray] = {}
    copies = {f"{path}.weight": array for path, array in tensors.get("base", {}).items()}
    for path, array in tensors.get("saved", {}).items():
        module, _, own_name = path.rpartition(".")
        replaces = is_saved_module(module, names) or (
            own_name == "bias" and (bias == "all" or (bias == "lora_only" and module in modules))
        )
        (saved if replaces else copies)[path] = array
    return dict(sorted(saved.items())), copies


def is_saved_module(module: str, names: Iterable[str]) -> bool:
    """Whether a module, or one above it, is one that ``modules_to_save`` names."""
    parts = module.split(".")
    above = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    # PEFT compares with str.endswith, so "norm" hits "layernorm" too.
    return any(path.endswith(name) for path in above for name in names)


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
