"""What an adapter does once it meets its base: to each site of a graph, or to each parameter.

:func:`site_changes` gives the tensors of a switchable graph, :func:`parameter_changes` the new
values of a merged one; both come from the same :class:`~lora_edge.adapter.Adapter`. Knows the
maths and the kinds of layers; knows nothing of graphs, files or PyTorch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_edge.adapter import Adapter, LowRank, TokenRows
from lora_edge.bundle import SiteEntry
from lora_edge.errors import AdapterError, UnsupportedAdapterError
from lora_edge.experts import ExpertLora, ParameterModule, assign, expert_lora
from lora_edge.lora import (
    Factors,
    FloatArray,
    Head,
    SiteChange,
    WideArray,
    concatenate,
    full_rank,
    row_replacement,
)
from lora_edge.names import FACTOR_PARTS, Part
from lora_edge.peft_types import MERGE_FIRST

Weights = Callable[[str], "NDArray[np.floating] | None"]
"""Parameter path -> the base's value in the checkpoint's layout; ``None`` where it has none."""

ParameterChange = Callable[["WideArray | None"], WideArray]
"""The base's value in float64 (``None`` where it has none) -> the adapter's. A linear weight is
``[out, in]`` here whatever the checkpoint's layout."""

_ONE_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")

_KIND_OF_PART: dict[Part, str] = {
    "A": "lora", "B": "lora", "gate": "lora", "G": "dora", "bias": "bias", "weight": "norm",
    "W": "head", "c": "head",
}  # fmt: skip
_NO_BIAS = ("bias", "embedding")
KINDS = ("lora", "dora", "bias", "norm", "embedding", "conv", "head")
"""What ``export --kinds`` takes."""


def kind_of(entry: SiteEntry, part: Part) -> str:
    """Which of :data:`KINDS` an input of a site belongs to."""
    if part in FACTOR_PARTS and entry.kind in ("embedding", "conv"):
        return entry.kind
    return _KIND_OF_PART[part]


def parts_of_kinds(entry: SiteEntry, kinds: tuple[str, ...]) -> tuple[Part, ...]:
    """The inputs that a site gets when a graph is exported for some kinds, whoever needs them."""
    possible: dict[str, tuple[Part, ...]] = {
        "linear": (*FACTOR_PARTS, "G", "bias"),
        "embedding": (*FACTOR_PARTS, "G"),
        "conv": (*FACTOR_PARTS, "G", "bias"),
        "norm": ("weight", "bias") if entry.bias else ("weight",),
        "head": ("W", "c"),
    }
    wanted = (entry.kind, "dora") if entry.kind in ("embedding", "conv") else ("dora",)
    return tuple(
        part
        for part in possible[entry.kind]
        if (set(wanted) <= set(kinds) if part == "G" else kind_of(entry, part) in kinds)
    )


def alone(adapter: Adapter, modules: Mapping[str, SiteEntry]) -> str:
    """Why an adapter can be neither blended nor weighted; empty where it can."""
    if any(module.magnitude is not None for module in adapter.modules.values()):
        return "DoRA rescales the base by norms that belong to its own weight 1"
    if adapter.invocation:
        return "an activated LoRA works on its own tokens only"
    heads = [path for path, entry in modules.items() if entry.kind == "head"]
    if any(path.rpartition(".")[0] in heads for path in adapter.saved):
        return "its task head replaces the base's"
    return ""


def check_modules(
    adapter: Adapter,
    modules: Mapping[str, SiteEntry],
    where: str,
    stacks: Mapping[str, ParameterModule] | None = None,
) -> None:
    """Check that every layer that an adapter changes is there, of its kind and in its shape.

    Args:
        adapter: the adapter.
        modules: module path -> layer of the base.
        where: names the base, or the graph, in errors.
        stacks: module path -> module with stacked parameters (experts).

    Raises:
        AdapterError: a layer is missing (near misses are named), or has another shape.
        UnsupportedAdapterError: it changes something that is no layer of a known kind.
    """
    for path in adapter.stacked:
        if path not in (stacks or {}):
            near = difflib.get_close_matches(path, stacks or {}, n=3)
            raise AdapterError(
                f"adapter {adapter.name} changes parameters of {path}, and {where} has no stacked "
                f"parameters there" + (f"; near misses: {', '.join(near)}" if near else ""),
                f"The adapter is for another base: {adapter.base_model}",
            )
    for path, module in adapter.modules.items():
        entry = _entry(adapter, modules, path, where)
        if entry.refusal:
            raise UnsupportedAdapterError(
                f"adapter {adapter.name} is refused in both modes: {path} {entry.refusal}",
                "Leave the layer out of target_modules; modules_to_save takes it whole.",
            )
        wanted = (module.in_features, module.out_features)
        kinds = {"linear": ("linear", "head"), "embedding": ("embedding",), "conv": ("conv",)}
        if entry.kind not in kinds[module.kind] or wanted != (
            entry.in_features,
            entry.out_features,
        ):
            raise AdapterError(
                f"adapter {adapter.name}: {path} is a {module.kind} layer [{wanted[0]} -> "
                f"{wanted[1]}], {where} has a {entry.kind} layer "
                f"[{entry.in_features} -> {entry.out_features}]",
                f"The adapter is for another base: {adapter.base_model}",
            )
    for path, tokens in adapter.tokens.items():
        entry = _entry(adapter, modules, path, where)
        vocab, size = entry.in_features, entry.out_features
        if entry.kind != "embedding":
            vocab, size = size, vocab
        if tokens.rows.shape[1] != size or max(tokens.indices) >= vocab:
            raise AdapterError(
                f"adapter {adapter.name}: {path} has trained rows {tokens.rows.shape} up to token "
                f"{max(tokens.indices)}, {where} has [{vocab}, {size}] there",
                f"The adapter is for another base: {adapter.base_model}",
            )
    for path in adapter.saved:
        module_path, _, own = path.rpartition(".")
        layer = modules.get(module_path)
        if own not in ("weight", "bias") or layer is None or (own, layer.kind) == _NO_BIAS:
            raise UnsupportedAdapterError(
                f"adapter {adapter.name} is refused in both modes: it replaces {path}, which is no "
                f"weight or bias of a linear, embedding, convolution or norm layer of {where}",
                f"If the adapter is for this base, and not for another: {MERGE_FIRST}",
            )
        expected = _shape_of(layer, own)
        if expected is not None and adapter.saved[path].shape != expected:
            raise AdapterError(
                f"adapter {adapter.name} replaces {path} by {adapter.saved[path].shape}, {where} "
                f"has {expected} there",
                f"The adapter is for another base: {adapter.base_model}",
            )


def _shape_of(layer: SiteEntry, own: str) -> tuple[int, ...] | None:
    """The shape of a layer's weight or bias in the checkpoint; ``None`` where it may be any."""
    if layer.kind == "head" or (layer.kind == "conv" and own == "weight"):
        return None
    if own == "bias" or layer.kind == "norm":
        return (layer.out_features,)
    if layer.kind == "embedding" or layer.transposed:
        return layer.in_features, layer.out_features
    return layer.out_features, layer.in_features


def check_base_of(adapter: Adapter, fingerprint: str, name: str) -> None:
    """Check that an adapter was trained on this base, where its trainer recorded on which.

    Raises:
        AdapterError: it was another base; both fingerprints are named.
    """
    if adapter.base_fingerprint is not None and adapter.base_fingerprint != fingerprint:
        raise AdapterError(
            f"adapter {adapter.name} was trained on a base with fingerprint "
            f"{adapter.base_fingerprint[:12]}, {name} has {fingerprint[:12]}",
            f"Export it with its own base: {adapter.base_model}",
        )


def check_copies(adapter: Adapter, weights: Weights | None, tied: tuple[str, ...]) -> None:
    """Check that what PEFT saved of the base along with an adapter is the base's.

    PEFT writes such a copy over the base when it loads the adapter, so one that differs would
    change the base for every adapter.

    Raises:
        UnsupportedAdapterError: it differs; the tensor is named.
        AdapterError: there is such a copy and the base is not at hand.
    """
    for path in adapter.base_copies:
        if not same_copy(adapter, weights, path, tied):
            raise UnsupportedAdapterError(
                f"adapter {adapter.name} is refused in both modes: it was saved with {path}, which "
                "differs from the base's and would replace it for every adapter",
                "Train with modules_to_save, or save with save_embedding_layers=False.",
            )


def same_copy(adapter: Adapter, weights: Weights | None, path: str, tied: tuple[str, ...]) -> bool:
    """Whether a copy of the base's parameter that was saved along equals the base's.

    Raises:
        AdapterError: the base is not at hand.
    """
    value, copy = base_value(adapter, weights, path, tied), adapter.base_copies[path]
    return value is not None and np.array_equal(value, copy)


def base_value(
    adapter: Adapter, weights: Weights | None, path: str, tied: tuple[str, ...]
) -> NDArray[np.floating] | None:
    """The base's value of a parameter, or ``None``; a tied head has the embedding's.

    Raises:
        AdapterError: the base is not at hand.
    """
    if weights is None:
        raise AdapterError(
            f"adapter {adapter.name} cannot be added without the base: what it feeds to the graph "
            f"follows from the base's {path}",
            "Give the base model with --base.",
        )
    value = weights(path)
    if value is None and tied and path == f"{tied[1]}.weight":
        return weights(f"{tied[0]}.weight")
    return value


def site_changes(
    adapter: Adapter,
    modules: Mapping[str, SiteEntry],
    weights: Weights | None,
    tied: tuple[str, ...],
) -> dict[str, SiteChange]:
    """What an adapter feeds to each site of a switchable graph.

    Args:
        adapter: the adapter, checked by :func:`check_modules`.
        modules: module path -> layer of the base.
        weights: the base's parameters, ``None`` where it is not at hand; asked only for what needs
            them (DoRA, whatever replaces).
        tied: module paths of the embedding and of the output layer that shares its weight, or ().

    Returns:
        module path -> change, of the sites that the adapter touches.

    Raises:
        AdapterError: a base weight is needed and not there.
    """
    return _SiteChanges(adapter, modules, weights, tied).found()


class _SiteChanges:
    def __init__(
        self,
        adapter: Adapter,
        modules: Mapping[str, SiteEntry],
        weights: Weights | None,
        tied: tuple[str, ...],
    ) -> None:
        self._adapter = adapter
        self._modules = modules
        self._weights = weights
        self._tied = tied
        self._factors: dict[str, list[tuple[Factors, float]]] = {}
        self._vectors: dict[tuple[str, str], FloatArray] = {}
        self._heads: dict[str, Head] = {}

    def found(self) -> dict[str, SiteChange]:
        for path, module in self._adapter.modules.items():
            self._low_rank(path, module)
        for path, tokens in self._adapter.tokens.items():
            self._token_rows(path, tokens)
        for path, value in self._adapter.saved.items():
            self._replace(path, value)
        paths = {*self._factors, *self._heads, *(path for path, _ in self._vectors)}
        return {path: self._change(path) for path in sorted(paths)}

    def _change(self, path: str) -> SiteChange:
        pairs = self._factors.get(path)
        return SiteChange(
            factors=concatenate(pairs) if pairs else None,
            gain=self._vectors.get((path, "gain")),
            bias=self._vectors.get((path, "bias")),
            weight=self._vectors.get((path, "weight")),
            head=self._heads.get(path),
        )

    def _low_rank(self, path: str, module: LowRank) -> None:
        factors = module.factors()
        if module.magnitude is not None:
            gain = module.gain(self._matrix(path))
            assert gain is not None
            scaled = (factors.B.astype(np.float64) * gain).astype(np.float32)
            factors = Factors(factors.A, scaled)
            self._vectors[path, "gain"] = (gain - 1.0).astype(np.float32)
        self._factors.setdefault(path, []).append((factors, 1.0))
        if module.bias is not None:
            self._add_bias(path, module.scaling * module.bias.astype(np.float64))

    def _token_rows(self, path: str, tokens: TokenRows) -> None:
        rows = self._value(f"{path}.weight")[list(tokens.indices)]
        change = tokens.rows.astype(np.float64) - rows
        vocab = len(self._value(f"{path}.weight"))
        pair = row_replacement(tokens.indices, change, vocab)
        if self._modules[path].kind == "embedding":
            self._factors.setdefault(path, []).append((pair, 1.0))
        for output in _output_layers(path, self._adapter, self._modules, self._tied):
            turned = Factors(np.ascontiguousarray(pair.B.T), np.ascontiguousarray(pair.A.T))
            self._factors.setdefault(output, []).append((turned, 1.0))

    def _replace(self, parameter: str, value: FloatArray) -> None:
        path, _, own = parameter.rpartition(".")
        entry = self._modules[path]
        if entry.kind == "head":
            self._replace_head(path, own)
            return
        base = self._base(parameter)
        if base is None and own == "weight":
            raise self._missing(parameter)
        change = value.astype(np.float64) - (0.0 if base is None else base.astype(np.float64))
        if own == "bias":
            self._add_bias(path, change)
        elif entry.kind == "norm":
            self._vectors[path, "weight"] = change.astype(np.float32)
        else:
            matrix = change.reshape(change.shape[0], -1)
            if entry.kind == "embedding" or entry.transposed:
                matrix = matrix.T
            if entry.kind == "conv":
                matrix = dense_kernel(change, entry.in_features).reshape(entry.out_features, -1)
            self._factors.setdefault(path, []).append((full_rank(matrix), 1.0))

    def _replace_head(self, path: str, own: str) -> None:
        weight = self._adapter.saved.get(f"{path}.weight")
        if weight is None:
            raise AdapterError(
                f"adapter {self._adapter.name} replaces {path}.{own} and not {path}.weight",
                "Save the adapter again with modules_to_save.",
            )
        if weight.shape[1] != self._modules[path].in_features:
            raise AdapterError(
                f"adapter {self._adapter.name}: its head {path} is {weight.shape}, expected "
                f"[labels, {self._modules[path].in_features}]",
                f"The adapter is for another base: {self._adapter.base_model}",
            )
        c = self._adapter.saved.get(f"{path}.bias", np.zeros(len(weight), np.float32))
        self._heads[path] = Head(np.ascontiguousarray(weight.T), c)

    def _add_bias(self, path: str, change: WideArray) -> None:
        old = self._vectors.get((path, "bias"), np.float32(0))
        self._vectors[path, "bias"] = (old + change).astype(np.float32)

    def _value(self, parameter: str) -> WideArray:
        value = self._base(parameter)
        if value is None:
            raise self._missing(parameter)
        return value.astype(np.float64)

    def _base(self, parameter: str) -> NDArray[np.floating] | None:
        return base_value(self._adapter, self._weights, parameter, self._tied)

    def _matrix(self, path: str) -> WideArray:
        """A layer's weight as ``[out, in]``, of a grouped convolution ``[out, in / groups]``."""
        entry, value = self._modules[path], self._value(f"{path}.weight")
        if entry.kind == "conv":
            return value.reshape(entry.out_features, -1)
        return value.T if entry.kind == "embedding" or entry.transposed else value

    def _missing(self, parameter: str) -> AdapterError:
        return AdapterError(
            f"adapter {self._adapter.name} needs the base's {parameter}, which it does not have",
            "Is this the adapter's own base?",
        )


def parameter_changes(
    adapter: Adapter,
    modules: Mapping[str, SiteEntry],
    tied: tuple[str, ...],
    stacks: Mapping[str, ParameterModule] | None = None,
) -> dict[str, ParameterChange]:
    """The new value of every parameter that an adapter changes, as a function of the base's.

    Args and errors as :func:`site_changes` and :func:`check_modules`.
    """
    changes: dict[str, ParameterChange] = {}

    def then(path: str, change: ParameterChange) -> None:
        first = changes.get(path)
        changes[path] = change if first is None else (lambda value: change(first(value)))

    for path, value in adapter.saved.items():
        turned = value.ndim == 2 and modules[path.rpartition(".")[0]].transposed
        then(path, _Constant(value.T if turned else value))
    for path, tokens in adapter.tokens.items():
        outputs = _output_layers(path, adapter, modules, tied)
        for owner in {path, *outputs} if modules[path].kind == "embedding" else set(outputs):
            then(f"{owner}.weight", _Rows(tokens))
    for path, module in adapter.modules.items():
        then(f"{path}.weight", _Adapted(module))
        if module.bias is not None:
            then(f"{path}.bias", _Shift(module.scaling * module.bias.astype(np.float64)))
    for path, stacked in adapter.stacked.items():
        module_of = (stacks or {})[path]
        targets = [str(x) for x in adapter.config.get("target_parameters") or ()]
        for name, pair in assign(path, module_of, stacked.levels, targets).items():
            expert = expert_lora(
                f"{path}.{name}",
                module_of.parameters[name],
                pair,
                stacked.scaling,
                transposed=module_of.transposed,
                peft_version=adapter.config.get("peft_version"),
            )
            then(f"{path}.{name}", _Experts(expert))
    return changes


@dataclass(frozen=True)
class _Experts:
    lora: ExpertLora

    def __call__(self, base: WideArray | None) -> WideArray:
        assert base is not None
        if base.ndim == 2:
            return base + self.lora.delta(0)
        return np.stack([matrix + self.lora.delta(i) for i, matrix in enumerate(base)])


@dataclass(frozen=True)
class _Constant:
    value: FloatArray

    def __call__(self, base: WideArray | None) -> WideArray:  # noqa: ARG002
        return self.value.astype(np.float64)


@dataclass(frozen=True)
class _Rows:
    tokens: TokenRows

    def __call__(self, base: WideArray | None) -> WideArray:
        assert base is not None
        changed = base.copy()
        changed[list(self.tokens.indices)] = self.tokens.rows
        return changed


@dataclass(frozen=True)
class _Shift:
    change: WideArray

    def __call__(self, base: WideArray | None) -> WideArray:
        return self.change if base is None else base + self.change


@dataclass(frozen=True)
class _Adapted:
    module: LowRank

    def __call__(self, base: WideArray | None) -> WideArray:
        assert base is not None
        module = self.module
        if module.kind == "embedding":
            return self._adapted(base.T, module.gain(base.T)).T
        if module.kind == "conv":
            kernel = dense_kernel(base, module.in_features)
            gain = module.gain(base.reshape(len(base), -1))
            return self._adapted(kernel.reshape(len(kernel), -1), gain).reshape(kernel.shape)
        return self._adapted(base, module.gain(base))

    def _adapted(self, weight: WideArray, gain: WideArray | None) -> WideArray:
        adapted = weight + self.module.delta()
        return adapted if gain is None else adapted * gain[:, None]


def dense_kernel(kernel: WideArray, in_features: int) -> WideArray:
    """A convolution's kernel ``[out, channels / groups, *k]`` without groups, block by block.

    PEFT's A reads all channels, so a change of a grouped convolution is dense.

    Args:
        kernel: of any number of groups.
        in_features: all channels times the size of ``k``.
    """
    out, share, *size = kernel.shape
    channels = in_features // int(np.prod(size))
    if share == channels:
        return kernel
    groups = channels // share
    dense = np.zeros((out, channels, *size))
    for group in range(groups):
        rows = slice(group * out // groups, (group + 1) * out // groups)
        dense[rows, group * share : (group + 1) * share] = kernel[rows]
    return dense


def _output_layers(
    path: str, adapter: Adapter, modules: Mapping[str, SiteEntry], tied: tuple[str, ...]
) -> list[str]:
    """The output layers whose rows trained token rows replace: itself, or the one that is tied."""
    if modules[path].kind != "embedding":
        return [path]
    # Token rows follow the tie, though PEFT saves the embedding's key alone.
    return [tied[1]] if tied and tied[0] == path and tied[1] not in adapter.tokens else []


def _entry(adapter: Adapter, modules: Mapping[str, SiteEntry], path: str, where: str) -> SiteEntry:
    entry = modules.get(path)
    if entry is None:
        if _ONE_EXPERT.search(path):
            raise UnsupportedAdapterError(
                f"adapter {adapter.name} changes {path}, a linear layer of one expert, which "
                "sees only the tokens that were sent to it; transformers 5 has no such layers, "
                f"and {where} keeps all experts in one parameter",
                MERGE_FIRST,
            )
        near = difflib.get_close_matches(path, modules, n=3)
        raise AdapterError(
            f"adapter {adapter.name} changes {path}, and {where} has no such site"
            + (f"; near misses: {', '.join(near)}" if near else ""),
            f"The adapter is for another base: {adapter.base_model}",
        )
    return entry
