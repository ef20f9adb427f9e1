"""The hyper-parameters of a training run, checked in one place. Knows nothing of torch or PEFT."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lora_edge.errors import AdapterError

ALL_LINEAR = "all-linear"
_DEFAULT = "Correct it, or leave it out for the default."


@dataclass(frozen=True)
class Settings:
    """What is trained, and how.

    Attributes:
        rank: r, the default rank of every adapted module.
        alpha: LoRA's alpha; the scaling is ``alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA.
        target_modules: ``all-linear`` (every linear layer but the output head), a tuple of module
            names (the ends of module paths), or a regex over whole module paths.
        rslora: scale by ``alpha / sqrt(rank)``.
        rank_pattern: module name or regex -> rank, over ``rank``; the first match wins.
        alpha_pattern: module name or regex -> alpha, over ``alpha``; the first match wins.
        dropout: on the input of ``lora_A``, during training only.
        epochs: passes over the data; fractions are allowed.
        lr: peak learning rate of AdamW; 3 % linear warm-up, then linear decay to 0.
        weight_decay: of AdamW, on both factors; keeps what training changes small.
        batch_size: examples per step.
        max_length: tokens per example, prompt and completion together; ``None``: the smaller of
            1024 and what the base's positions allow.
        seed: of the initial weights, the order of the examples and the dropout.
    """

    rank: int = 8
    alpha: float = 16.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    epochs: float = 3.0
    lr: float = 2e-4
    weight_decay: float = 0.0
    batch_size: int = 8
    max_length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant.

        Raises:
            AdapterError: a value out of its range, or a pattern that is not a regex.
        """
        for name, least in (("rank", 1), ("batch_size", 1), ("seed", 0)):
            _require(name, getattr(self, name), at_least=least)
        if self.max_length is not None:
            _require("max_length", self.max_length, at_least=2)
        for name in ("alpha", "epochs", "lr"):
            _require_positive(name, getattr(self, name))
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0.0):
            raise AdapterError(
                f"weight_decay is {self.weight_decay}, expected 0 or more", "0 is no decay."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise AdapterError(
                f"dropout is {self.dropout}, expected 0 <= dropout < 1",
                "0 leaves it out; 0.05 to 0.1 is common.",
            )
        for key, rank in self.rank_pattern.items():
            _require(f"rank_pattern[{key!r}]", rank, at_least=1)
        for key, alpha in self.alpha_pattern.items():
            _require_positive(f"alpha_pattern[{key!r}]", alpha)
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

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        values = asdict(self)
        if isinstance(self.target_modules, tuple):
            values["target_modules"] = list(self.target_modules)
        return values


def _require(name: str, value: int, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise AdapterError(
            f"{name} is {value!r}, expected a whole number of at least {at_least}", _DEFAULT
        )


def _require_positive(name: str, value: float) -> None:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise AdapterError(f"{name} is {value!r}, expected a number above 0", _DEFAULT)
