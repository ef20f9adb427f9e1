"""What an adapter carries and which modes can take it, found without PyTorch and before any export.

Knows adapters and the headers of a base's safetensors files; knows nothing of graphs. A base's
layers are read off the names and shapes of its tensors, so what only the built model can tell (the
kind of a layer, convolution groups) is taken as the adapter has it, and checked at export.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_edge.adapter import Adapter, examine
from lora_edge.adapter_parts import LowRank
from lora_edge.base import Base
from lora_edge.effects import parameter_changes
from lora_edge.errors import AdapterError
from lora_edge.fit import base_value, check_base_of, check_modules, same_copy
from lora_edge.kinds import alone
from lora_edge.manifest import SiteEntry, SiteKind
from lora_edge.peft_directory import read_config
from lora_edge.refusals import MODES, Mode, Refusal

_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")
_GENERATES = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class ModuleFacts:
    """The low-rank pair of a module.

    Attributes:
        kind: ``linear``, ``embedding`` or ``conv``.
        rank: r.
        alpha: the alpha that applies to the module.
        scaling: the factor on BA.
        in_features: size of the input; of an embedding the vocabulary, of a convolution channels
            times kernel.
        out_features: size of the output.
        dora: it has a magnitude.
        bias: its B has a bias (``lora_bias``).
        relative_norm: ‖W' − W‖ / ‖W‖ (Frobenius), DoRA's gain included; ``None`` without a base.
    """

    kind: str
    rank: int
    alpha: float
    scaling: float
    in_features: int
    out_features: int
    dora: bool
    bias: bool
    relative_norm: float | None


@dataclass(frozen=True)
class SavedFacts:
    """A parameter that replaces the base's.

    Attributes:
        shape: its shape.
        head: it belongs to a task head.
        switchable_bytes: size of what carries it in a switchable bundle: of a matrix a pair of full
            rank, float32.
        relative_norm: ‖new − W‖ / ‖W‖; ``None`` without a base, or where the base has none.
    """

    shape: tuple[int, ...]
    head: bool
    switchable_bytes: int
    relative_norm: float | None


@dataclass(frozen=True)
class TokenFacts:
    """Trained rows of an embedding.

    Attributes:
        indices: token ids.
        size: numbers in a row.
        reaches: the output layer that shares the embedding's weight, and whose rows they replace
            too; empty where none does, ``None`` without a base.
    """

    indices: tuple[int, ...]
    size: int
    reaches: str | None


@dataclass(frozen=True)
class StackFacts:
    """The factors of a module's stacked parameters (``target_parameters``).

    Attributes:
        pairs: shapes of ``A [E * r, in]`` and ``B [out, r * E]`` of each parameter, in the order of
            PEFT's wrappers; whose they are, only the built model tells.
        scaling: the factor on each product.
    """

    pairs: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    scaling: float


@dataclass(frozen=True)
class CopyFacts:
    """A copy of a parameter of the base that PEFT saved along.

    Attributes:
        shape: its shape.
        equal: it is the base's; ``None`` without a base.
    """

    shape: tuple[int, ...]
    equal: bool | None


@dataclass(frozen=True)
class Inspection:
    """Everything that is known of an adapter before an export.

    Attributes:
        path: the PEFT directory.
        kind: what it is, for people; the ``peft_type`` where both modes refuse it.
        base_model: ``base_model_name_or_path`` of its config.
        base: the base that it was compared with, if any.
        modules: module path -> low-rank pair.
        saved: parameter path -> replacement.
        tokens: module path -> trained rows.
        stacked: module path -> factors of its stacked parameters.
        copies: parameter path -> copy of the base.
        invocation: token ids that activate an aLoRA.
        labels: names of the task head's outputs.
        alone: why it can be neither blended nor weighted; empty where it can.
        warnings: what is right but worth a look.
        modes: mode -> the reasons why it is refused there; none: the mode takes it. Those that lie
            in the base are in both.
    """

    path: str
    kind: str
    base_model: str | None
    base: str | None
    modules: Mapping[str, ModuleFacts]
    saved: Mapping[str, SavedFacts]
    tokens: Mapping[str, TokenFacts]
    stacked: Mapping[str, StackFacts]
    copies: Mapping[str, CopyFacts]
    invocation: tuple[int, ...]
    labels: tuple[str, ...]
    alone: str
    warnings: tuple[str, ...]
    modes: Mapping[Mode, tuple[Refusal, ...]]

    @property
    def refused(self) -> bool:
        """No mode takes it."""
        return all(self.modes.values())


def inspect_adapter(path: str | os.PathLike[str], base: Base | None = None) -> Inspection:
    """Gather what is known of a PEFT directory, and of how it fits a base.

    Raises:
        AdapterError: the folder has no readable config.
        BaseModelError: a weight of the base cannot be read.
    """
    directory = Path(path)
    adapter, refusals = examine(directory, "adapter")
    if adapter is None:
        config = read_config(directory)
        return Inspection(
            str(directory),
            str(config.get("peft_type")),
            config.get("base_model_name_or_path"),
            None,
            {}, {}, {}, {}, {}, (), (), "", (),
            _by_mode(refusals),
        )  # fmt: skip
    fit = _Fit(adapter, base) if base is not None else None
    if fit is not None:
        refusals += fit.refusals()
    return Inspection(
        path=str(directory),
        kind=adapter.kind,
        base_model=adapter.base_model,
        base=base.name_or_path if base is not None else None,
        modules={
            name: _module_facts(module, fit.change(f"{name}.weight") if fit else None)
            for name, module in adapter.modules.items()
        },
        saved={
            name: SavedFacts(
                value.shape,
                name.rpartition(".")[0] in adapter.heads,
                _switchable_bytes(value.shape),
                fit.change(name) if fit else None,
            )
            for name, value in adapter.saved.items()
        },
        tokens={
            name: TokenFacts(
                rows.indices, int(rows.rows.shape[1]), fit.reached(name) if fit else None
            )
            for name, rows in adapter.tokens.items()
        },
        stacked={
            name: StackFacts(
                tuple((a.shape, b.shape) for _, (a, b) in sorted(factors.levels.items())),
                factors.scaling,
            )
            for name, factors in adapter.stacked.items()
        },
        copies={
            name: CopyFacts(value.shape, fit.same(name) if fit else None)
            for name, value in adapter.base_copies.items()
        },
        invocation=adapter.invocation,
        labels=adapter.labels,
        alone=alone(adapter, {path: SiteEntry(0, 0, "head") for path in adapter.heads}),
        warnings=adapter.warnings,
        modes=_by_mode(refusals),
    )


def mode_refusals(path: str | os.PathLike[str], base: Base) -> Mapping[Mode, tuple[Refusal, ...]]:
    """The reasons for which each mode refuses an adapter for a base, without reading its weights.

    Raises:
        AdapterError: the folder has no readable config.
        BaseModelError: the base cannot be read.
    """
    adapter, refusals = examine(Path(path), "adapter")
    if adapter is not None:
        refusals += _Fit(adapter, base).refusals()
    return _by_mode(refusals)


def _by_mode(refusals: list[Refusal]) -> dict[Mode, tuple[Refusal, ...]]:
    return {mode: tuple(x for x in refusals if mode in x.modes) for mode in MODES}


def _module_facts(module: LowRank, relative_norm: float | None) -> ModuleFacts:
    return ModuleFacts(
        kind=module.kind,
        rank=module.rank,
        alpha=module.alpha,
        scaling=module.scaling,
        in_features=module.in_features,
        out_features=module.out_features,
        dora=module.magnitude is not None,
        bias=module.bias is not None,
        relative_norm=relative_norm,
    )


def _switchable_bytes(shape: tuple[int, ...]) -> int:
    if len(shape) < 2:
        return _FLOAT_BYTES * math.prod(shape)
    sides = (shape[0], math.prod(shape[1:]))
    return _FLOAT_BYTES * sum(sides) * min(sides)


class _Fit:
    """An adapter beside a base."""

    def __init__(self, adapter: Adapter, base: Base) -> None:
        self._adapter = adapter
        self._base = base
        self._tied = _tied(adapter, base)
        self._layers = dict(_layers(adapter, base, self._tied))
        self._misfits = dict(self._found_misfits())
        self._changes = parameter_changes(self._fitting(), self._layers, self._tied)

    def refusals(self) -> list[Refusal]:
        """Why the adapter is not for this base: layers that are missing or of another shape …."""
        found = [Refusal(str(error), error.hint) for error in self._misfits.values()]
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
                        "Train with modules_to_save, or save with save_embedding_layers=False.",
                    )
                )
        return found

    def change(self, path: str) -> float | None:
        """‖new − W‖ / ‖W‖ of a parameter; ``None`` where the base has none, or it does not fit."""
        change = self._changes.get(path)
        if change is None:
            return None
        value = base_value(self._adapter, self._base.parameter, path, self._tied)
        if value is None:
            return None
        entry = self._layers[path.rpartition(".")[0]]
        wide = value.astype(np.float64)
        if entry.transposed and wide.ndim == 2:
            wide = wide.T
        size = float(np.linalg.norm(wide))
        return float(np.linalg.norm(change(wide) - wide)) / size if size else None

    def same(self, path: str) -> bool:
        """Whether a copy of the base is the base's."""
        return same_copy(self._adapter, self._base.parameter, path, self._tied)

    def reached(self, path: str) -> str:
        """The output layer that trained rows of an embedding reach, or an empty string."""
        if self._tied and self._tied[0] == path and self._tied[1] not in self._adapter.tokens:
            return self._tied[1]
        return ""

    def _found_misfits(self) -> Iterator[tuple[str, AdapterError]]:
        nothing = dataclasses.replace(self._adapter, modules={}, saved={}, tokens={}, stacked={})
        whole = self._adapter
        parts = [
            (path, dataclasses.replace(nothing, modules={path: x}))
            for path, x in whole.modules.items()
        ]
        parts += [
            (path, dataclasses.replace(nothing, saved={path: x})) for path, x in whole.saved.items()
        ]
        parts += [
            (path, dataclasses.replace(nothing, tokens={path: x}))
            for path, x in whole.tokens.items()
        ]
        for path, part in parts:
            try:
                check_modules(part, self._layers, self._base.name_or_path)
            except AdapterError as error:
                yield path, error

    def _fitting(self) -> Adapter:
        return dataclasses.replace(
            self._adapter,
            stacked={},  # whose factors are whose, only the built model tells
            modules={k: v for k, v in self._adapter.modules.items() if k not in self._misfits},
            saved={k: v for k, v in self._adapter.saved.items() if k not in self._misfits},
            tokens={k: v for k, v in self._adapter.tokens.items() if k not in self._misfits},
        )


def _layers(adapter: Adapter, base: Base, tied: tuple[str, ...]) -> Iterator[tuple[str, SiteEntry]]:
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
) -> SiteEntry:
    size = math.prod(shape[1:])
    if len(shape) == 1:
        return SiteEntry(shape[0], shape[0], "norm", bias)
    if kind == "embedding":
        return SiteEntry(shape[0], size, "embedding")
    if len(shape) > 2:
        module = adapter.modules.get(path)
        if module is not None and module.in_features % size == 0:
            size = module.in_features  # A reads all channels; the kernel holds those of a group
        return SiteEntry(size, shape[0], "conv", bias)
    module = adapter.modules.get(path)
    transposed = bool(adapter.config.get("fan_in_fan_out"))
    if module is not None and shape != shape[::-1]:
        transposed = shape == (module.in_features, module.out_features)
    inputs, outputs = shape if transposed else shape[::-1]
    return SiteEntry(inputs, outputs, kind or "linear", bias, transposed=transposed)


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
