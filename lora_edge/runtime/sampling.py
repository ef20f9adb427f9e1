"""Choosing the next token from logits: greedy, or sampled with temperature, top-k and top-p."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_edge.errors import DataError
from lora_edge.lora import FloatArray


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 is greedy (the smallest id among equals); else logits are divided by it.
        top_k: only the k likeliest tokens; 0 is all.
        top_p: only the likeliest tokens whose probabilities, after top-k, sum to at least this; 1
            is all. The likeliest token always stays.
        seed: same seed, same samples; None draws a new one.

    Raises:
        DataError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more"),
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

    def probabilities(self, logits: FloatArray) -> NDArray[np.float64]:
        """``[vocab]`` logits -> ``[vocab] float64`` probabilities; zero for the tokens left out.

        Temperature first, then top-k, then top-p, as transformers' ``generate`` orders them.
        """
        scaled = logits.astype(np.float64)
        scaled = (scaled - scaled.max()) / (self.temperature or 1.0)
        weights: NDArray[np.float64] = np.exp(scaled)
        if self.temperature == 0:
            weights = np.zeros_like(scaled)
            weights[int(np.argmax(logits))] = 1.0
        # A stable order makes ties fall to the smaller id.
        order = np.argsort(-weights, kind="stable")
        keep = order.size if self.top_k == 0 else min(self.top_k, order.size)
        weights[order[keep:]] = 0.0
        weights /= weights.sum()
        if self.top_p < 1:
            before = np.cumsum(weights[order]) - weights[order]
            weights[order[before >= self.top_p]] = 0.0
            weights /= weights.sum()
        return weights

    def choose(self, logits: FloatArray, generator: np.random.Generator) -> int:
        """The next token's id, from ``[vocab]`` logits."""
        if self.temperature == 0:
            return int(np.argmax(logits))
        cumulative = np.cumsum(self.probabilities(logits))
        point = generator.random() * cumulative[-1]
        return int(np.searchsorted(cumulative, point, side="right"))
