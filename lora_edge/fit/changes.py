"""What an adapter does once it meets its base: to each site of a graph, or to each parameter.

:func:`site_changes` gives the tensors of a switchable graph, :func:`parameter_changes` the new
values of a merged one; both come from the same :class:`~lora_edge.adapter.load.Adapter`. Knows the
maths and the kinds of layers; knows nothing of graphs, files or PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from lora_edge.adapter.load import Adapter
from lora_edge.adapter.parts import LowRank, TokenRows
from lora_edge.base.layer import Layer
from lora_edge.errors import AdapterError, UnsupportedAdapterError
from lora_edge.fit.check import Weights, base_value
from lora_edge.fit.values import (
    Adapted,
    Constant,
    Experts,
    OneExpert,
    Rows,
    Shift,
    dense_kernel,
)
from lora_edge.maths.experts import ParameterModule, assign, expert_lora, place_of
from lora_edge.maths.lora import (
    Factors,
    FloatArray,
    Head,
    SiteChange,
    WideArray,
    concatenate,
    full_rank,
    row_replacement,
)

ParameterChange = Callable[["WideArray | None"], WideArray]
"""The base's value in float64 (``None`` where it has none) -> the adapter's. A linear weight is
``[out, in]`` here whatever the checkpoint's layout."""


def site_changes(
    adapter: Adapter,
    modules: Mapping[str, Layer],
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


def refuse_single_experts(adapter: Adapter, modules: Mapping[str, Layer]) -> None:
    """Refuse an adapter on layers of single experts, which only a merged graph can take.

    Raises:
        UnsupportedAdapterError: it has such a layer; the layer is named.
    """
    if adapter.stacked:
        raise UnsupportedAdapterError(
            f"adapter {adapter.name} is refused in switchable mode: it changes parameters of "
            f"{min(adapter.stacked)} (target_parameters), an expert's, whose weights are chosen "
            "for each token and have no branch",
            "Use --mode merged, or train with target_modules on linear layers.",
        )
    for path in adapter.modules:
        if path not in modules:
            raise UnsupportedAdapterError(
                f"adapter {adapter.name} is refused in switchable mode: {path} is a layer of one "
                "expert, whose weights are chosen for each token and have no branch",
                "Use --mode merged, or train with target_modules on the attention.",
            )


class _SiteChanges:
    def __init__(
        self,
        adapter: Adapter,
        modules: Mapping[str, Layer],
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
        refuse_single_experts(self._adapter, self._modules)
        for path, module in self._adapter.modules.items():
            if path not in self._modules or self._modules[path].kind != "head":
                self._low_rank(path, module)
        for path, tokens in self._adapter.tokens.items():
            self._token_rows(path, tokens)
        for path, value in self._adapter.saved.items():
            self._replace(path, value)
        for path, entry in self._modules.items():
            if entry.kind == "head":
                self._replace_head(path)
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
        table = self._base(f"{path}.weight")
        if table is None:
            raise self._missing(f"{path}.weight")
        rows = table[list(tokens.indices)].astype(np.float64)
        pair = row_replacement(tokens.indices, tokens.rows.astype(np.float64) - rows, len(table))
        if self._modules[path].kind == "embedding":
            self._factors.setdefault(path, []).append((pair, 1.0))
        for output in _output_layers(path, self._adapter, self._modules, self._tied):
            turned = Factors(np.ascontiguousarray(pair.B.T), np.ascontiguousarray(pair.A.T))
            self._factors.setdefault(output, []).append((turned, 1.0))

    def _replace(self, parameter: str, value: FloatArray) -> None:
        path, _, own = parameter.rpartition(".")
        entry = self._modules[path]
        if entry.kind == "head":
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

    def _replace_head(self, path: str) -> None:
        """A head that the adapter brings, or changes by a low-rank pair or a bias."""
        saved, module = self._adapter.saved, self._adapter.modules.get(path)
        weight, bias = saved.get(f"{path}.weight"), saved.get(f"{path}.bias")
        if weight is None and bias is None and module is None:
            return
        if weight is None:
            own = self._matrix(path)
            weight = (own if module is None else Adapted(module)(own)).astype(np.float32)
        if weight.shape[1] != self._modules[path].in_features:
            raise AdapterError(
                f"adapter {self._adapter.name}: its head {path} is {weight.shape}, expected "
                f"[labels, {self._modules[path].in_features}]",
                f"The adapter is for another base: {self._adapter.base_model}",
            )
        if bias is None and f"{path}.weight" not in saved and self._modules[path].bias:
            bias = self._value(f"{path}.bias").astype(np.float32)
        c = np.zeros(len(weight), np.float32) if bias is None else bias
        if module is not None and module.bias is not None:
            c = (c + module.scaling * module.bias.astype(np.float64)).astype(np.float32)
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
    modules: Mapping[str, Layer],
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
        then(path, Constant(value.T if turned else value))
    for path, tokens in adapter.tokens.items():
        outputs = _output_layers(path, adapter, modules, tied)
        rows = Rows(tokens)  # one change of a tied weight
        for owner in {path, *outputs} if modules[path].kind == "embedding" else set(outputs):
            then(f"{owner}.weight", rows)
    for path, module in adapter.modules.items():
        place = place_of(path, stacks or {})
        if place is not None:
            then(place.parameter, OneExpert(place, module))
            continue
        then(f"{path}.weight", Adapted(module))
        if module.bias is not None:
            then(f"{path}.bias", Shift(module.scaling * module.bias.astype(np.float64)))
    for path, stacked in adapter.stacked.items():
        module_of = (stacks or {})[path]
        targets = [str(x) for x in adapter.config.get("target_parameters") or ()]
        for name, pair in assign(path, module_of, stacked.levels, targets).items():
            expert = expert_lora(
                f"{path}.{name}",
                module_of.parameters[name],
                pair,
                stacked.scaling(name),
                transposed=module_of.transposed,
                peft_version=adapter.config.get("peft_version"),
            )
            rank = stacked.alphas[name][0]
            if expert.rank != rank:
                raise AdapterError(
                    f"adapter {adapter.name}: {expert.path} has rank {expert.rank}, but the config "
                    f"says {rank}",
                    "The config and the tensors are from different adapters; save it again.",
                )
            then(f"{path}.{name}", Experts(expert))
    return changes


def _output_layers(
    path: str, adapter: Adapter, modules: Mapping[str, Layer], tied: tuple[str, ...]
) -> list[str]:
    """The output layers whose rows trained token rows replace: itself, or the one that is tied."""
    if modules[path].kind != "embedding":
        return [path]
    # Token rows follow the tie, though PEFT saves the embedding's key alone.
    return [tied[1]] if tied and tied[0] == path and tied[1] not in adapter.tokens else []
