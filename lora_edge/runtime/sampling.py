"""Choosing the next token from logits: greedy or sampled, as transformers' logits processors do."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_edge.errors import DataError, OptionError
from lora_edge.maths.lora import FloatArray
from lora_edge.runtime.finite import not_finite
from lora_edge.types import number


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 is greedy (the smallest id among equals); else logits are divided by it.
        top_k: only the k likeliest tokens, and those as likely as the last of them; 0 is all.
        top_p: only the likeliest tokens whose probabilities, after top-k, sum to at least this; 1
            is all. The likeliest token always stays.
        seed: same seed, same samples; None draws a new one.
        repetition_penalty: of the tokens that the row has already, prompt included, positive logits
            are divided by it and negative ones multiplied (Keskar et al. 2019, section 4.1); 1 is
            none. It changes what is greedy, too.
        min_p: only the tokens that are at least this many times as likely as the likeliest one,
            after top-k and top-p (Nguyen et al. 2024); 0 is all.

    Raises:
        OptionError: a value of another type.
        DataError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_k", "top_p", "seed", "repetition_penalty", "min_p"):
            value = getattr(self, name)
            whole = name in {"top_k", "seed"}
            kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
            if isinstance(value, bool) or not isinstance(value, kinds):
                if name == "seed" and value is None:
                    continue
                expected = "a whole number" if whole else "a number"
                raise OptionError(
                    f"{name} is {value!r:.100}, expected {expected}",
                    "temperature=0 is greedy; top_k=0 and top_p=1 keep every token.",
                )
            if isinstance(value, int) and not whole:
                number(name, value)  # which a float can hold
        for name, good, expected in (
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more"),
            (
                "repetition_penalty",
                math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
                "more than 0",
            ),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
        ):
            if not good:
                raise DataError(
                    f"{name} is {getattr(self, name)}, expected {expected}",
                    "temperature=0 is greedy; top_k=0 and top_p=1 keep every token.",
                )

    def generators(self, prompts: Sequence[Sequence[int]]) -> list[np.random.Generator]:
        """One random generator per row, from the seed, the row's own prompt, and how often that
        prompt came before in the batch: a row's samples do not depend on its neighbours or its
        place.
        """
        if self.seed is None:
            return [np.random.default_rng() for _ in prompts]
        seen: Counter[tuple[int, ...]] = Counter()
        generators = []
        for prompt in map(tuple, prompts):
            generators.append(np.random.default_rng([self.seed, seen[prompt], *prompt]))
            seen[prompt] += 1
        return generators

    def penalized(self, logits: FloatArray, history: Collection[int] = ()) -> FloatArray:
        """``[vocab]`` logits with the repetition penalty of the tokens in ``history``."""
        if self.repetition_penalty == 1 or not history:
            return logits
        seen = np.fromiter(history, np.int64)
        out, factor = logits.copy(), np.float32(self.repetition_penalty)
        out[seen] = np.where(out[seen] < 0, out[seen] * factor, out[seen] / factor)
        return out

    def probabilities(
        self, logits: FloatArray, history: Collection[int] = ()
    ) -> NDArray[np.float64]:
        """``[vocab]`` logits -> ``[vocab] float64`` probabilities; zero for the tokens left out.

        The penalty of repetitions first, then temperature, top-k, top-p and min-p, as transformers'
        ``generate`` orders them (``_get_logits_processor``).

        Args:
            logits: ``[vocab] float32``.
            history: the row's tokens so far, its prompt included; more than once is once.
        """
        logits = self.penalized(logits, history)
        scaled = logits.astype(np.float64)
        scaled = (scaled - scaled.max()) / (self.temperature or 1.0)
        weights: NDArray[np.float64] = np.exp(scaled)
        if self.temperature == 0:
            weights = np.zeros_like(scaled)
            weights[int(np.argmax(logits))] = 1.0
        if 0 < self.top_k < weights.size:
            weights[weights < np.partition(weights, -self.top_k)[-self.top_k]] = 0.0
        weights /= weights.sum()
        if self.top_p < 1:
            # A stable order makes ties fall to the smaller id.
            order = np.argsort(-weights, kind="stable")
            before = np.cumsum(weights[order]) - weights[order]
            weights[order[before >= self.top_p]] = 0.0
            weights /= weights.sum()
        if self.min_p > 0:
            weights[weights < self.min_p * weights.max()] = 0.0
            weights /= weights.sum()
        return weights

    def choose(
        self, logits: FloatArray, generator: np.random.Generator, history: Collection[int] = ()
    ) -> int:
        """The next token's id, from ``[vocab]`` logits and the row's tokens so far.

        Raises:
            DataError: the logits are NaN or infinite.
        """
        if self.temperature == 0:
            values = self.penalized(logits, history)
            best = int(values.argmax())  # the first NaN, where there is one
            if not math.isfinite(values[best]):
                raise not_finite()
            return best
        with np.errstate(invalid="ignore"):
            cumulative = np.cumsum(self.probabilities(logits, history))
        if not np.isfinite(cumulative[-1]):
            raise not_finite()
        point = generator.random() * cumulative[-1]
        return int(np.searchsorted(cumulative, point, side="right"))
