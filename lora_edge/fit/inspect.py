"""What an adapter carries and which modes can take it, found before any export.

Knows adapters and how they compare with bases; knows nothing of graphs.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_edge.adapter.directory import read_config, text_aspects
from lora_edge.adapter.load import examine
from lora_edge.adapter.parts import LowRank
from lora_edge.adapter.refusals import MODES, Mode, Refusal
from lora_edge.adapter.source import peft_directory
from lora_edge.base.checkpoint import Base
from lora_edge.base.layer import Layer
from lora_edge.errors import BundleError
from lora_edge.fit.compare import Fit
from lora_edge.fit.kinds import alone
from lora_edge.names import TextAspect

_FLOAT_BYTES = 4
_VARYING = re.compile(r"; near misses: .*|\b[\w-]+(?:\.[\w-]+)+|\d+|'[^']*'")


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
        scalings: name of a parameter that may be targeted -> the factor on its product.
    """

    pairs: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    scalings: Mapping[str, float]


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
        compared: what of the base: the ``model`` that transformers builds, or, without PyTorch, the
            ``names`` and shapes of the checkpoint's tensors; ``None`` without a base.
        modules: module path -> low-rank pair.
        saved: parameter path -> replacement.
        tokens: module path -> trained rows.
        stacked: module path -> factors of its stacked parameters.
        copies: parameter path -> copy of the base.
        invocation: token ids that activate an aLoRA.
        labels: names of the task head's outputs.
        alone: why it can be neither blended nor weighted; empty where it can.
        warnings: what is right but worth a look.
        text: what the folder brings that has to do with text: ``tokenizer``, ``chat_template``;
            carried where it differs from the base's.
        modes: mode -> the reasons why it is refused there; none: the mode takes it. Those that lie
            in the base are in both.
    """

    path: str
    kind: str
    base_model: str | None
    base: str | None
    compared: Literal["model", "names"] | None
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
    text: tuple[TextAspect, ...] = ()

    @property
    def refused(self) -> bool:
        """No mode takes it."""
        return all(self.modes.values())


def inspect_adapter(
    path: str | os.PathLike[str], base: Base | None = None, task: str | None = None
) -> Inspection:
    """Gather what is known of a PEFT directory, and of how it fits a base.

    Args:
        path: the PEFT directory, a hub id, or a folder of MLX-LM.
        base: what it is to be compared with.
        task: as ``export`` takes it; ``None``: what the adapter was trained for.

    Raises:
        AdapterError: the folder has no readable config.
        BaseModelError: a weight of the base cannot be read.
    """
    with peft_directory(path) as directory:
        return _inspected(directory, os.fspath(path), base, task)


def _inspected(directory: Path, shown: str, base: Base | None, task: str | None) -> Inspection:
    adapter, refusals = examine(directory, "adapter")
    if adapter is None:
        config = read_config(directory)
        return Inspection(
            shown,
            str(config.get("peft_type")),
            config.get("base_model_name_or_path"),
            None,
            None,
            {}, {}, {}, {}, {}, (), (), "", (),
            _by_mode(refusals),
        )  # fmt: skip
    fit = Fit(adapter, base, task) if base is not None else None
    warnings = adapter.warnings
    if fit is not None:
        refusals += fit.refusals()
        warnings += fit.warnings
    heads = adapter.heads if fit is None else fit.heads
    text: tuple[TextAspect, ...] = ()
    try:
        text = text_aspects(directory)
    except BundleError as error:
        warnings += (f"what it brings of text cannot be read: {error}",)
    return Inspection(
        path=shown,
        kind=adapter.kind,
        base_model=adapter.base_model,
        base=base.name_or_path if base is not None else None,
        compared=fit.compared if fit is not None else None,
        modules={
            name: _module_facts(module, fit.change(f"{name}.weight") if fit else None)
            for name, module in adapter.modules.items()
        },
        saved={
            name: SavedFacts(
                value.shape,
                name.rpartition(".")[0] in heads,
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
                {name: factors.scaling(name) for name in sorted(factors.alphas)},
            )
            for name, factors in adapter.stacked.items()
        },
        copies={
            name: CopyFacts(value.shape, fit.same(name) if fit else None)
            for name, value in adapter.base_copies.items()
        },
        invocation=adapter.invocation,
        labels=adapter.labels,
        alone=alone(adapter, {path: Layer(0, 0, "head") for path in heads}),
        warnings=warnings,
        modes=_by_mode(refusals),
        text=text,
    )


def mode_refusals(
    path: str | os.PathLike[str], base: Base, task: str | None = None
) -> Mapping[Mode, tuple[Refusal, ...]]:
    """The reasons for which each mode refuses an adapter for a base, whether trained or not yet.

    Args:
        path, base, task: as :func:`inspect_adapter`.

    Raises:
        AdapterError: the folder has no readable config.
        BaseModelError: the base cannot be read.
    """
    adapter, refusals = examine(Path(path), "adapter", trained=False)
    if adapter is not None:
        refusals += Fit(adapter, base, task).refusals()
    return _by_mode(refusals)


def _by_mode(refusals: list[Refusal]) -> dict[Mode, tuple[Refusal, ...]]:
    alike: dict[tuple[str, str, tuple[Mode, ...]], list[Refusal]] = {}
    for refusal in refusals:
        # One cause on many layers differs in their names, their numbers and the near misses.
        cause = _VARYING.sub("", refusal.message)
        alike.setdefault((cause, refusal.hint, refusal.modes), []).append(refusal)
    found = [
        first._replace(message=f"{first.message}; the same for {len(rest)} more") if rest else first
        for first, *rest in alike.values()
    ]
    return {mode: tuple(x for x in found if mode in x.modes) for mode in MODES}


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
