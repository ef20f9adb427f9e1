"""The hyper-parameters of a training run, checked in one place. Knows nothing of torch or PEFT."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lora_edge import types as opt
from lora_edge.errors import AdapterError
from lora_edge.files.schema import decode

ALL_LINEAR = "all-linear"
BIASES = ("none", "all", "lora_only")
INITS = ("default", "gaussian", "orthogonal", "pissa", "olora")
CONVERTED_INITS = ("pissa", "olora")
SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = ("fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")
BASE_FORMATS = ("fp32", "bf16", "4bit")

_LARGEST_SEED = (1 << 32) - 1  # of numpy's random numbers, which transformers seeds too

_DEFAULT = "Correct it, or leave it out for the default."
_CHOICES = {
    "bias": BIASES,
    "init": INITS,
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
    "device": DEVICES,
    "base_format": BASE_FORMATS,
}


@dataclass(frozen=True)
class Settings:
    """What is trained, and how.

    Attributes:
        rank: r, the default rank of every adapted module.
        alpha: LoRA's alpha; the scaling is ``alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA.
        target_modules: ``all-linear`` (every linear layer but the output head), a tuple of module
            names (the ends of module paths), or a regex over whole module paths.
        rslora: scale by ``alpha / sqrt(rank)``.
        dora: train a magnitude for each output besides (DoRA).
        rank_pattern: module name or regex -> rank, over ``rank``; the first match wins.
        alpha_pattern: module name or regex -> alpha, over ``alpha``; the first match wins.
        dropout: on the input of ``lora_A``, during training only.
        bias: the base's biases that are trained: ``none``, ``all``, ``lora_only`` (those of the
            adapted layers).
        modules_to_save: names of modules that are trained whole.
        layers: indices of the layers that are adapted; empty: all.
        init: of the factors: ``default`` (A random, B = 0), ``gaussian``, ``orthogonal``, or
            ``pissa`` and ``olora``, which start from the base's weights and are converted when they
            are saved, at twice the rank, to a LoRA for the base as it was.
        loraplus_ratio: learning rate of B over that of A (LoRA+); 1 is plain AdamW.
        epochs: passes over the data; fractions are allowed.
        max_steps: optimizer steps, over ``epochs``.
        lr: peak learning rate of AdamW.
        schedule: after the warm-up: ``linear`` or ``cosine`` to 0, or ``constant``.
        warmup: share of the steps in which the learning rate rises from 0.
        weight_decay: of AdamW, on both factors; keeps what training changes small.
        max_grad_norm: gradients are scaled down to this norm.
        batch_size: examples (packed: rows) per forward pass and process.
        accumulate: forward passes per optimizer step and process.
        gradient_checkpointing: compute activations again in the backward pass: less memory.
        precision: of the computation: ``fp32``, or autocast to ``bf16`` or ``fp16``.
        base_format: of the frozen base: ``fp32``, ``bf16`` (half the memory), ``4bit`` (QLoRA).
        device: ``cpu``, ``cuda``, or ``auto``: cuda where there is one.
        max_length: tokens per example, prompt and completion together; ``None``: the smaller of
            1024 and what the base's positions allow.
        drop_too_long: leave out examples without a target within ``max_length``; else they are
            refused.
        packing: put several examples into one row of ``max_length``, each blind to the others.
        group_by_length: put examples of like length into one batch.
        full_logits: compute the output head on every position, as transformers does; else only
            where there is a target.
        eval_split: share of the data that is kept for evaluation, drawn by the seed.
        eval_every: steps between evaluations; ``None``: once an epoch.
        save_every: steps between checkpoints; ``None``: at evaluations, else each tenth of the
            run, but not more often than every 50 steps.
        patience: stop after so many evaluations without a better loss; ``None``: never.
        seed: of the initial weights, the order of the examples and the dropout.
        deterministic: on CUDA, use deterministic algorithms only; a CPU does in any case.
    """

    rank: int = 8
    alpha: float = 16.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    rslora: bool = False
    dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    init: str = "default"
    loraplus_ratio: float = 1.0
    epochs: float = 3.0
    max_steps: int | None = None
    lr: float = 2e-4
    schedule: str = "linear"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    batch_size: int = 8
    accumulate: int = 1
    gradient_checkpointing: bool = False
    precision: str = "fp32"
    base_format: str = "fp32"
    device: str = "auto"
    max_length: int | None = None
    drop_too_long: bool = False
    packing: bool = False
    group_by_length: bool = False
    full_logits: bool = False
    eval_split: float = 0.0
    eval_every: int | None = None
    save_every: int | None = None
    patience: int | None = None
    seed: int = 0
    deterministic: bool = False

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant; lists become tuples.

        Raises:
            AdapterError: a value out of its range, or a pattern that is not a regex.
        """
        self._check_types()
        for name in ("target_modules", "modules_to_save", "layers"):
            value = getattr(self, name)
            if not isinstance(value, (str, tuple)):
                object.__setattr__(self, name, tuple(value))
        self._check_numbers()
        self._check_words()
        self._check_patterns()
        self._check_together()

    def _check_types(self) -> None:
        for each in dataclasses.fields(self):
            name, kind, value = each.name, str(each.type), getattr(self, each.name)
            if kind == "bool":
                opt.flag(name, value)
            elif kind == "str":
                opt.text(name, value)
            elif kind == "float" and (
                isinstance(value, bool) or not isinstance(value, (int, float))
            ):
                raise opt.refused(name, value, "a number")
            elif kind.startswith("Mapping"):
                opt.pairs(name, value)
            elif "tuple[str" in kind and not (isinstance(value, str) and kind.startswith("str")):
                opt.words(name, value)
            elif kind == "tuple[int, ...]":
                opt.listed(name, value)

    def _check_numbers(self) -> None:
        for name in ("rank", "batch_size", "accumulate"):
            _require(name, getattr(self, name), at_least=1)
        opt.whole("seed", self.seed, 0, _LARGEST_SEED)
        for name in ("max_steps", "eval_every", "save_every", "patience"):
            if getattr(self, name) is not None:
                _require(name, getattr(self, name), at_least=1)
        if self.max_length is not None:
            _require("max_length", self.max_length, at_least=2)
        for name in ("alpha", "epochs", "lr", "max_grad_norm", "loraplus_ratio"):
            _require_positive(name, getattr(self, name))
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0.0):
            raise AdapterError(
                f"weight_decay is {self.weight_decay}, expected 0 or more",
                "0 leaves it out; 0.01 to 0.1 is common.",
            )
        for name, hint in (
            ("dropout", "0 leaves it out; 0.05 to 0.1 is common."),
            ("warmup", "0 leaves it out; 0.03 is the default."),
            ("eval_split", "0 leaves it out; 0.1 keeps a tenth of the data."),
        ):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise AdapterError(
                    f"{name} is {getattr(self, name)}, expected 0 <= {name} < 1", hint
                )
        for key, rank in self.rank_pattern.items():
            _require(f"rank_pattern[{key!r}]", rank, at_least=1)
        for key, alpha in self.alpha_pattern.items():
            _require_positive(f"alpha_pattern[{key!r}]", alpha)
        for layer in self.layers:
            _require("a layer", layer, at_least=0)

    def _check_words(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise AdapterError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}",
                    _DEFAULT,
                )

    def _check_patterns(self) -> None:
        if not self.target_modules:
            raise AdapterError(
                "target_modules is empty", "Leave it out to adapt every linear layer."
            )
        regexes = [*self.rank_pattern, *self.alpha_pattern]
        if isinstance(self.target_modules, str):
            regexes.append(self.target_modules)
        for regex in regexes:
            try:
                re.compile(regex)
            except re.error as error:
                raise AdapterError(
                    f"{regex!r} is not a regular expression: {error}",
                    "Quote it for the shell, and write a literal dot as \\. in a pattern.",
                ) from error

    def _check_together(self) -> None:
        if self.layers and isinstance(self.target_modules, str) and not self.all_linear:
            raise AdapterError(
                "layers are given beside a regex of target modules, which has them already",
                "Put the layers into the regex, or give names.",
            )
        patterns = self.rank_pattern or self.alpha_pattern
        if self.init in CONVERTED_INITS and self.rslora and patterns:
            raise AdapterError(
                f"init is {self.init} with rsLoRA and patterns, which PEFT cannot convert back",
                "Leave out one of them.",
            )
        if self.init in CONVERTED_INITS and (self.dora or self.base_format == "4bit"):
            other = "DoRA" if self.dora else "a 4-bit base"
            raise AdapterError(
                f"init is {self.init} with {other}, which cannot be converted back",
                "Leave out one.",
            )
        if self.packing and self.group_by_length:
            raise AdapterError(
                "packing and group_by_length are both set; packed rows are all as long",
                "Give one of them.",
            )

    @property
    def all_linear(self) -> bool:
        """Every linear layer but the output head is adapted."""
        return self.target_modules == ALL_LINEAR

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        values = asdict(self)
        for name, value in values.items():
            if isinstance(value, tuple):
                values[name] = list(value)
        return values

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Settings:
        """The settings of a record; those that it lacks have their defaults.

        Raises:
            AdapterError: it holds something that is no setting.
        """
        known = {one.name for one in fields(Settings)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise AdapterError(
                f"the record has settings that this release does not know: {', '.join(unknown)}",
                "Update lora-edge.",
            )
        # Release 0.1 computed the head everywhere, and its records do not say so.
        whole = {"full_logits": True, **values}
        return decode(Settings, whole, "the record's settings", AdapterError, _DEFAULT)


def changed(one: Settings, other: Settings) -> Sequence[str]:
    """Names of the settings in which two differ."""
    return [
        entry.name
        for entry in fields(Settings)
        if getattr(one, entry.name) != getattr(other, entry.name)
    ]


def _require(name: str, value: int, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise AdapterError(
            f"{name} is {value!r}, expected a whole number of at least {at_least}", _DEFAULT
        )


def _require_positive(name: str, value: float) -> None:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise AdapterError(f"{name} is {value!r}, expected a number above 0", _DEFAULT)
