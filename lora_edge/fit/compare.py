"""An adapter beside a base, before any export: what does not fit, and how much it changes.

The base's layers are those of the model that transformers builds from its config, as at export.
Without PyTorch they are read off the names and shapes of the checkpoint's tensors: transformers may
call them otherwise, and what only the model can tell (the kind of a layer, convolution groups) is
taken as the adapter has it. Knows adapters and bases; knows nothing of graphs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lora_edge.adapter.load import Adapter
from lora_edge.adapter.loading import BaseView
from lora_edge.adapter.refusals import Refusal
from lora_edge.base.checkpoint import Base
from lora_edge.base.layer import Layer, SiteKind
from lora_edge.base.layers import Layers, built_layers, built_weights
from lora_edge.errors import AdapterError, BaseModelError, LoraEdgeError, MissingDependencyError
from lora_edge.fit.changes import parameter_changes, refuse_single_experts
from lora_edge.fit.check import (
    Weights,
    base_value,
    check_base_of,
    check_kinds,
    check_loads,
    check_modules,
    hint_of_copy,
    other_base,
    same_copy,
)
from lora_edge.fit.rename import new_names, renamed, without_unread
from lora_edge.fit.task import chosen_task
from lora_edge.tasks.task import Task

_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")
_GENERATES = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


class Fit:
    """An adapter beside a base.

    Attributes:
        compared: as :class:`Inspection` has it.
        warnings: what is worth a look in the base.
        names: module path of the adapter -> the base's, where they differ.
    """

    def __init__(self, adapter: Adapter, base: Base, task: str | None) -> None:
        self._adapter = adapter
        self._base = base
        self._task = Task()
        self._against: list[Refusal] = []
        self.warnings: tuple[str, ...] = ()
        self.names: Mapping[str, str] = {}
        built = self._built(task)
        self.compared: Literal["model", "names"] = "names" if built is None else "model"
        if built is None:
            tied = _tied(adapter, base)
            built = Layers(dict(_layers(adapter, base, tied)), tied, {}, None)
        self._layers, self._tied, self._stacks = built.modules, built.tied, built.parameter_modules
        notice = other_base(adapter, base)
        self.warnings += (notice,) if notice else ()
        if self.compared == "model":
            self._fit_names(adapter)
        self._view = BaseView(built.modules, built.tied, built.output, self.compared == "model")
        self._adapter = self._adapter.settled(self._layers)
        self._misfits = dict(self._found_misfits())
        self._changes = parameter_changes(self._fitting(), self._layers, self._tied, self._stacks)

    def _fit_names(self, adapter: Adapter) -> None:
        """Give the adapter the model's names, as an export does."""
        try:
            adapter = without_unread(adapter, self._layers, self._task, self._warn)
        except AdapterError as error:
            self._against.append(Refusal(str(error), error.hint))
            return
        names = new_names(adapter, self._layers, self._base.model_type)
        if names:
            old, new = next(iter(names.items()))
            self._warn(f"{len(names)} modules are renamed: {old} is {new} today")
        # A renamed config names whole paths, so that a module without tensors would not be missed.
        self._adapter = renamed(adapter, names) if names else adapter
        self.names = names

    def _built(self, asked: str | None) -> Layers | None:
        """The layers of the model, ``None`` where it cannot be built here."""
        try:
            # Sized as the adapter's own head, which is what it is compared with.
            self._task = chosen_task(self._base, [self._adapter], asked, "merged", self._warn)
            built = built_layers(self._base, self._task)
        except MissingDependencyError:
            return None
        except (AdapterError, BaseModelError) as error:
            self._against.append(Refusal(str(error), error.hint))
            return None
        if built.refused is not None:
            self._warn(f"the trace backend refuses the base: {built.refused}")
        return built

    def _warn(self, line: str) -> None:
        self.warnings += (line,)

    @cached_property
    def heads(self) -> frozenset[str]:
        """Module paths of the adapter's task head."""
        owners = {path.rpartition(".")[0] for path in self._adapter.saved}
        found = {path for path in owners if self._kind(path) == "head"}
        return self._adapter.heads | found

    def refusals(self) -> list[Refusal]:
        """Why the adapter is not for this base: layers that are missing or of another shape …."""
        # Without the model, what its checkpoint's names say may be wrong, and is no second reason.
        found = [*self._against] or [Refusal(str(x), x.hint) for x in self._misfits.values()]
        if not (self._stacks or found):
            try:
                check_loads(self._adapter, self._view)
            except AdapterError as error:
                found.append(Refusal(str(error), error.hint))
        if self._adapter.base_fingerprint is not None:
            try:
                check_base_of(self._adapter, self._base.fingerprint(), self._base.name_or_path)
            except AdapterError as error:
                found.append(Refusal(str(error), error.hint))
        for path in self._adapter.base_copies:
            if not self.same(path):
                found.append(
                    Refusal(
                        f"it was saved with {path}, which differs from the base's and would "
                        "replace it for every adapter",
                        hint_of_copy(self._adapter, self._value, path, self._tied),
                    )
                )
        try:
            refuse_single_experts(self._fitting(), self._layers)
        except LoraEdgeError as error:
            found.append(Refusal(str(error), error.hint, ("switchable",)))
        return found

    def change(self, path: str) -> float | None:
        """‖new − W‖ / ‖W‖ of a parameter; ``None`` where the base has none, or it does not fit."""
        path = self._named(path)
        change = self._changes.get(path)
        if change is None:
            return None
        value = base_value(self._adapter, self._value, path, self._tied)
        if value is None:
            return None
        entry = self._layers[path.rpartition(".")[0]]
        wide = value.astype(np.float64)
        if entry.transposed and wide.ndim == 2:
            wide = wide.T
        size = float(np.linalg.norm(wide))
        new = change(wide)
        if new.shape != wide.shape:  # a head of another size
            return None
        return float(np.linalg.norm(new - wide)) / size if size else None

    def same(self, path: str) -> bool:
        """Whether a copy of the base is the base's."""
        return same_copy(self._adapter, self._value, self._named(path), self._tied)

    def _named(self, path: str) -> str:
        """The base's name of a parameter that the adapter names."""
        owner, _, own = path.rpartition(".")
        return f"{self.names.get(owner, owner)}.{own}"

    def reached(self, path: str) -> str:
        """The output layer that trained rows of an embedding reach, or an empty string."""
        path = self.names.get(path, path)
        if self._tied and self._tied[0] == path and self._tied[1] not in self._adapter.tokens:
            return self._tied[1]
        return ""

    def _kind(self, path: str) -> str | None:
        return self._layers[path].kind if path in self._layers else None

    def _value(self, path: str) -> NDArray[np.floating] | None:
        """A parameter; the whole model is read where the checkpoint calls it otherwise."""
        value = self._base.parameter(path)
        if value is not None or self.compared == "names":
            return value
        owner = path.rpartition(".")[0]
        if self._kind(owner) == "head" or (self._tied and path == f"{self._tied[1]}.weight"):
            return None
        return self._weights(path)

    @cached_property
    def _weights(self) -> Weights:
        return built_weights(self._base, self._task)

    def _found_misfits(self) -> Iterator[tuple[str, LoraEdgeError]]:
        whole = self._adapter
        nothing = dataclasses.replace(whole, modules={}, saved={}, tokens={}, stacked={})
        built = self.compared == "model"
        for field in ("modules", "saved", "tokens", "stacked"):
            for path, value in getattr(whole, field).items():
                if field == "stacked" and self.compared == "names":
                    continue  # only the built model tells
                own: Any = {field: {path: value}}
                part = dataclasses.replace(nothing, **own)
                try:
                    if built:
                        check_kinds(part, self._layers, self._task)
                    check_modules(part, self._layers, self._base.name_or_path, self._stacks)
                except LoraEdgeError as error:
                    yield path, error

    def _fitting(self) -> Adapter:
        return dataclasses.replace(
            self._adapter,
            stacked={},  # not measured
            modules={k: v for k, v in self._adapter.modules.items() if k not in self._misfits},
            saved={k: v for k, v in self._adapter.saved.items() if k not in self._misfits},
            tokens={k: v for k, v in self._adapter.tokens.items() if k not in self._misfits},
        )


def _layers(adapter: Adapter, base: Base, tied: tuple[str, ...]) -> Iterator[tuple[str, Layer]]:
    """Module path -> layer, of the base's tensors and of what the adapter calls by longer paths."""
    kinds: dict[str, SiteKind] = {path: "embedding" for path in adapter.tokens}
    kinds |= {path: module.kind for path, module in adapter.modules.items()}
    kinds |= {path: "head" for path in adapter.heads}
    if tied:
        kinds[tied[1]] = "linear"
    keys = base.keys()
    own = [key.removesuffix(".weight") for key in keys if key.endswith(".weight")]
    for path in {*own, *_named(adapter), *tied}:
        shape = base.shape(f"{path}.weight")
        if shape is None and tied and path == tied[1]:
            shape = base.shape(f"{tied[0]}.weight")
        if shape is None and path in adapter.heads:  # the adapter brings it
            brought = adapter.saved.get(f"{path}.weight")
            shape = None if brought is None else brought.shape
        if shape is not None:
            bias = base.shape(f"{path}.bias") is not None
            yield path, _entry(adapter, path, shape, kinds.get(path), bias)


def _entry(
    adapter: Adapter, path: str, shape: tuple[int, ...], kind: SiteKind | None, bias: bool
) -> Layer:
    size = math.prod(shape[1:])
    if len(shape) == 1:
        return Layer(shape[0], shape[0], "norm", bias)
    if kind == "embedding":
        return Layer(shape[0], size, "embedding")
    if len(shape) > 2:
        module = adapter.modules.get(path)
        if module is not None and module.in_features % size == 0:
            size = module.in_features  # A reads all channels; the kernel holds those of a group
        return Layer(size, shape[0], "conv", bias)
    module = adapter.modules.get(path)
    transposed = bool(adapter.config.get("fan_in_fan_out"))
    if module is not None and shape != shape[::-1]:
        transposed = shape == (module.in_features, module.out_features)
    inputs, outputs = shape if transposed else shape[::-1]
    return Layer(inputs, outputs, kind or "linear", bias, transposed=transposed)


def _tied(adapter: Adapter, base: Base) -> tuple[str, ...]:
    """Module paths of the embedding and of the output layer that shares its weight, or ()."""
    config = base.config.get("text_config") or base.config
    keys = base.keys()
    rows = [key for key in keys if _rows(base, key) == config.get("vocab_size")]
    built = str(adapter.config.get("task_type") or _GENERATES[0])
    classes = base.config.get("architectures") or ()
    generates = built in _GENERATES and any(str(name).endswith(_CAUSAL) for name in classes)
    # Where the config does not say, a checkpoint with two such matrices has an output layer.
    if not generates or not rows or not config.get("tie_word_embeddings", len(rows) == 1):
        return ()
    key = next((key for key in rows if "emb" in key or "wte" in key), rows[0])
    named = [path for path in sorted(_named(adapter)) if f"{path}.weight".endswith(f".{key}")]
    outputs = [
        path
        for path in sorted(_named(adapter))
        if "." not in path and base.shape(f"{path}.weight") is None
    ]
    embedding = named[0] if named else key.removesuffix(".weight")
    return embedding, outputs[0] if outputs else "lm_head"


def _rows(base: Base, key: str) -> int | None:
    shape = base.shape(key)
    return shape[0] if shape is not None and len(shape) == 2 and key.endswith(".weight") else None


def _named(adapter: Adapter) -> set[str]:
    """Every module path that an adapter names."""
    parameters = (*adapter.saved, *adapter.base_copies)
    return {*adapter.modules, *adapter.tokens, *(path.rpartition(".")[0] for path in parameters)}
