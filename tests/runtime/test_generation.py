"""The loop alone: what it asks of sequences that grow, with or without a cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from lora_edge.errors import DataError
from lora_edge.maths.lora import FloatArray
from lora_edge.runtime.generation import Generation, check_room
from lora_edge.runtime.sampling import Sampling

VOCAB = 7


def _counting(rows: Sequence[Sequence[int]]) -> list[FloatArray]:
    """Logits whose best token is the last one plus one, and whose second is that plus two."""
    found = []
    for row in rows:
        logits = np.zeros((len(row), VOCAB), np.float32)
        for place, token in enumerate(row):
            logits[place, (token + 1) % VOCAB] = 2
            logits[place, (token + 2) % VOCAB] = 1
        found.append(logits)
    return found


class Counting:
    """Steps that count, whose logits are those of the last token of each row."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.seen: list[list[int]] = []

    def prefill(self, rows: Sequence[Sequence[int]]) -> FloatArray:
        self.rows = [list(row) for row in rows]
        return self._last()

    def advance(self, tokens: Sequence[int | None]) -> FloatArray:
        for row, token in zip(self.rows, tokens, strict=True):
            row.extend([] if token is None else [token])
        return self._last()

    def _last(self) -> FloatArray:
        self.seen.append([len(row) for row in self.rows])
        return np.stack([logits[-1] for logits in _counting(self.rows)])


def _run(count: int, eos: set[int], **options: Sequence[int]) -> list[list[int | None]]:
    generation = Generation(
        Counting(),
        [[0], [3, 4]],
        max_new_tokens=count,
        eos_ids=[eos, eos],
        sampling=Sampling(),
        **options,  # type: ignore[arg-type]
    )
    return list(generation)


def test_rows_end_by_themselves() -> None:
    assert _run(9, {6}) == [[1, 5], [2, 6], [3, None], [4, None], [5, None], [6, None]]
    assert _run(2, set()) == [[1, 5], [2, 6]]


def test_suppressed_tokens_are_never_chosen_and_some_not_first() -> None:
    assert _run(3, set(), suppress=[2]) == [[1, 5], [3, 6], [4, 0]]
    assert _run(3, set(), begin_suppress=[1]) == [[2, 5], [3, 6], [4, 0]]


def test_samples_follow_from_the_keys_and_not_from_the_neighbours() -> None:
    def sampled(keys: list[list[int]]) -> list[list[int | None]]:
        return list(
            Generation(
                Counting(),
                [[0]] * len(keys),
                max_new_tokens=12,
                eos_ids=[set()] * len(keys),
                sampling=Sampling(temperature=3.0, seed=1),
                keys=keys,
            )
        )

    both, one, other = sampled([[1], [2]]), sampled([[1]]), sampled([[2]])
    assert [row[0] for row in both] == [row[0] for row in one]
    assert [row[1] for row in both] == [row[0] for row in other]
    assert one != other


def test_a_finished_row_rests() -> None:
    steps = Counting()
    generation = Generation(
        steps,
        [[0], [0]],
        max_new_tokens=4,
        eos_ids=[set(), set()],
        sampling=Sampling(),
    )
    for _ in generation:
        generation.finish(1)
    assert steps.seen == [[1, 1], [2, 1], [3, 1], [4, 1]]


def test_room() -> None:
    check_room(3, 5, 8)
    check_room(10_000, 5, 0)  # any number of positions
    with pytest.raises(
        DataError, match="3 tokens and 6 new ones exceed the 8 positions of the model"
    ) as caught:
        check_room(3, 6, 8)
    assert "max_new_tokens=5" in caught.value.hint
    with pytest.raises(DataError, match="at least 1"):
        check_room(3, 0, 8)
