"""What is said about made-up failures, and what is not said where the numbers do not show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from lora_edge.maths.lora import FloatArray
from lora_edge.parity.compare import expect
from lora_edge.parity.explain.diagnosis import diagnose
from lora_edge.parity.explain.failure import Failure, Outputs, Run, Scaled
from lora_edge.parity.explain.repairs import repairs

LIMIT = 1e-5
VOCAB = 31
PROMPTS = (4, 9, 6)
STEPS = 3


@dataclass
class Fixed:
    """A bench whose answers are given."""

    without: Outputs | None = None
    each: Outputs | None = None
    same: Outputs | None = None
    whole: Outputs | None = None
    looks: dict[str, Outputs] = field(default_factory=dict)
    cures: dict[str, Outputs] = field(default_factory=dict)
    shares: dict[str, Callable[[float], Outputs]] = field(default_factory=dict)
    factors: dict[str, Callable[[float], Outputs]] = field(default_factory=dict)
    found: str = ""
    waking: Outputs | None = None
    most: int = 99
    batch: int = len(PROMPTS)

    def awake(self) -> Outputs | None:
        return self.waking

    def copies(self, row: int, count: int) -> Outputs:
        """Right up to ``most`` of them."""
        return [REFERENCE[row] + np.float32(index >= self.most) for index in range(count)]

    def off(self) -> tuple[Outputs, Fixed] | None:
        return None if self.without is None else (self.without, Fixed())

    def alone(self) -> Outputs | None:
        return self.each

    def alike(self) -> Outputs | None:
        return self.same

    def at_once(self) -> Outputs | None:
        return self.whole

    def lookalikes(self) -> Iterator[tuple[str, Run]]:
        yield from ((name, _prompts(rows)) for name, rows in self.looks.items())

    def leaks(self) -> Iterator[tuple[str, Scaled]]:
        for name, made in self.shares.items():
            yield name, lambda rows, share, made=made: _prompts(made(share))(rows)  # type: ignore[misc]

    def remedies(self) -> Iterator[tuple[str, Run]]:
        yield from ((name, _prompts(rows)) for name, rows in self.cures.items())

    def scaled(self) -> Iterator[tuple[str, int, Scaled]]:
        for name, made in self.factors.items():
            yield name, 5, lambda rows, share, made=made: _prompts(made(share))(rows)  # type: ignore[misc]

    def findings(self) -> str:
        return self.found


def _prompts(rows: Outputs) -> Run:
    return lambda indices: [rows[index][: PROMPTS[index]] for index in indices]


def _random(seed: int, size: float = 1.0) -> list[FloatArray]:
    random = np.random.default_rng(seed)
    return [
        (size * random.standard_normal((length + STEPS, VOCAB))).astype(np.float32)
        for length in PROMPTS
    ]


def _sum(*terms: tuple[float, Outputs]) -> list[FloatArray]:
    rows = zip(*(rows for _, rows in terms), strict=True)
    weights = [np.float32(weight) for weight, _ in terms]
    return [sum(w * x for w, x in zip(weights, row, strict=True)) for row in rows]  # type: ignore[misc]


BASE, EFFECT, OTHER = _random(0, 3), _random(1), _random(2)
REFERENCE = _sum((1, BASE), (1, EFFECT))


def _failure(actual: Outputs, **changes: Any) -> Failure:
    rows = [tuple(range(10 * i, 10 * i + n + STEPS)) for i, n in enumerate(PROMPTS)]
    expected = [expect(y, base) for y, base in zip(REFERENCE, BASE, strict=True)]
    longest = max(PROMPTS)
    failure = Failure(rows, PROMPTS, expected, actual, LIMIT, [n < longest for n in PROMPTS])
    return replace(failure, **changes)


def _changed(change: Callable[[int, int], bool], start: Outputs = REFERENCE) -> list[FloatArray]:
    """The rows, wrong at the (row, position) that are chosen."""
    noise = _random(7)
    return [
        np.where([[change(i, p)] for p in range(len(row))], row + noise[i], row)
        for i, row in enumerate(start)
    ]


def test_nothing_is_said_of_an_adapter_that_does_nothing_but_that() -> None:
    said = diagnose(_failure(BASE), Fixed(without=BASE))
    assert said == "the adapter does nothing: the outputs are the base's"
    nearly = _sum((1, BASE), (1e-3, EFFECT))
    assert "nothing" not in diagnose(_failure(nearly), Fixed(without=BASE))


def test_nan() -> None:
    actual = [row.copy() for row in REFERENCE]
    actual[1][5:, 3] = np.nan
    bench = Fixed(found="the file of a holds NaN or Inf, first in x")
    said = diagnose(_failure(actual), bench)
    assert said == f"NaN or Inf from position 5 of row 1 on; {bench.found}"
    assert "in the batch only" in diagnose(_failure(actual), replace(bench, each=REFERENCE))


@pytest.mark.parametrize(
    ("gain", "words"),
    [(2.0, "2.00 times what it should be"), (0.45, "0.45 times"), (-1.0, "its sign is reversed")],
)
def test_a_multiple_of_the_effect(gain: float, words: str) -> None:
    actual = _sum((1, BASE), (gain, EFFECT))
    assert words in diagnose(_failure(actual), Fixed())
    # Beside as much of something else, it is no multiple.
    mixed = _sum((1, BASE), (gain, EFFECT), (abs(gain), OTHER))
    said = diagnose(_failure(mixed), Fixed())
    assert "times what it should be" not in said
    assert "sign" not in said


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        (((1, EFFECT), (0.003, OTHER)), "the effect is there but for 0.3 % of it: rounding"),
        (((0.8, EFFECT), (0.5, OTHER)), "part of the effect is missing or wrong"),
        (((1.0, EFFECT), (0.1, OTHER)), "part of the effect is missing or wrong"),
        (((0.0, EFFECT), (1.5, OTHER)), "the effect is another one"),
        (((-1.0, EFFECT), (1.0, OTHER)), "the effect points the other way"),
    ],
)
def test_what_is_left_is_measured(terms: Sequence[tuple[float, Outputs]], words: str) -> None:
    bench = Fixed(found="the file of a holds what its PEFT files do")
    said = diagnose(_failure(_sum((1, BASE), *terms)), bench)
    assert words in said
    assert said.endswith(bench.found)
    for other in ("scaled", "sign", "does what", "cache", "padd", "base itself", "position"):
        assert other not in said


def test_the_base_is_told_from_the_adapter() -> None:
    wrong = _sum((1, BASE), (0.1, OTHER))
    actual = _sum((1, wrong), (1, EFFECT))
    said = diagnose(_failure(actual), Fixed(without=wrong))
    assert "the base itself is wrong (off by" in said
    assert "says nothing of the adapter" in said
    assert "base" not in diagnose(_failure(actual), Fixed(without=BASE))
    headed = diagnose(_failure(actual, headed=True), Fixed(without=wrong))
    assert "with its low-rank part off: the task head or the base is wrong" in headed
    own = [expect(row) for row in BASE]
    assert "the base itself is wrong" in diagnose(_failure(wrong, expected=own), Fixed())


def test_lookalikes_need_the_very_outputs() -> None:
    actual = _sum((1, BASE), (1, OTHER))
    bench = Fixed(looks={"it does what b does": actual})
    assert diagnose(_failure(actual), bench) == "it does what b does"
    near = _sum((1, actual), (3e-5, EFFECT))
    assert "it does what" not in diagnose(_failure(actual), Fixed(looks={"it does what b": near}))
    one = [actual[0], *near[1:]]  # the shortest row alone is not enough
    assert "it does what" not in diagnose(_failure(actual), Fixed(looks={"it does what b": one}))


def test_remedies_must_cure_every_row() -> None:
    actual = _sum((1, BASE), (1, OTHER))
    assert diagnose(_failure(actual), Fixed(cures={"q and k": REFERENCE})) == "q and k"
    half = [REFERENCE[0], *actual[1:]]
    assert "q and k" not in diagnose(_failure(actual), Fixed(cures={"q and k": half}))
    # Where the prompts are right, they are right with any remedy: nothing is shown by that.
    late = _changed(lambda i, p: p >= PROMPTS[i])
    assert "q and k" not in diagnose(_failure(late), Fixed(cures={"q and k": REFERENCE}))


def _bent(factor: float, scale: float) -> list[FloatArray]:
    """Far from proportional, and PyTorch's at ``factor * scale`` = 1."""
    x = np.float32(factor * scale)
    return [b + (x * e + (x * x - x) * o) for b, e, o in zip(BASE, EFFECT, OTHER, strict=True)]


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (2.0, "a is scaled by 2 (with its B times 0.5 it is right): check alpha, rank or rsLoRA"),
        (1.3, "a is scaled by 1.3 ("),
        (5**0.5, "a is scaled by 2.24, the root of its rank 5,"),
        (5**-0.5, "a is scaled by 0.447, 1 / the root of its rank 5,"),
        (-1.0, "a has its sign reversed"),
    ],
)
def test_a_factor_is_found_where_the_effect_is_not_proportional(scale: float, words: str) -> None:
    bench = Fixed(factors={"a": lambda factor: _bent(factor, scale)})
    assert words in diagnose(_failure(_bent(1, scale)), bench)


def test_no_factor_is_named_where_none_is_right() -> None:
    def never(factor: float) -> list[FloatArray]:
        return _sum((1, BASE), (factor, OTHER))

    said = diagnose(_failure(never(1)), Fixed(factors={"a": never}))
    assert "scaled" not in said
    assert "sign" not in said


def test_padding_is_blamed_only_where_padded_rows_alone_are_wrong() -> None:
    short = _changed(lambda i, _: PROMPTS[i] < max(PROMPTS))
    said = diagnose(_failure(short), Fixed(each=REFERENCE))
    assert "only rows that are padded are wrong" in said
    said = diagnose(_failure(short), Fixed(each=short))
    assert "padd" not in said
    every = _changed(lambda *_: True)
    said = diagnose(_failure(every), Fixed(each=REFERENCE))
    assert said == "each row alone is right: the rows of a batch are not kept apart"


def test_the_cache_is_blamed_only_where_its_absence_cures() -> None:
    late = _changed(lambda i, p: p > PROMPTS[i])
    assert "the KV cache" in diagnose(_failure(late), Fixed(whole=REFERENCE))
    assert "the KV cache" in diagnose(_failure(late), Fixed(whole=REFERENCE, each=REFERENCE))
    assert "cache" not in diagnose(_failure(late), Fixed(whole=late))
    early = _changed(lambda i, p: p >= PROMPTS[i] - 1)
    assert "cache" not in diagnose(_failure(early), Fixed(whole=REFERENCE))


def test_where_the_rows_go_wrong() -> None:
    second = _changed(lambda _, p: p >= 1)
    assert "right at each row's first token" in diagnose(_failure(second), Fixed())
    assert "first token" not in diagnose(_failure(second, causal=False), Fixed())
    one_row = _changed(lambda i, p: i == 1 and p >= 1)
    assert "first token" not in diagnose(_failure(one_row), Fixed())
    third = _changed(lambda _, p: p >= 3)
    assert "right before position 3 in every row" in diagnose(_failure(third), Fixed())
    uneven = _changed(lambda i, p: p >= 1 + i)
    assert "right before" not in diagnose(_failure(uneven), Fixed())
    moved = [np.concatenate([row[:1], row[:-1]]) for row in REFERENCE]
    said = diagnose(_failure(moved), Fixed())
    assert "each position of the prompts has the outputs of the one before it" in said
    moved = [np.concatenate([row[1:], row[-1:]]) for row in REFERENCE]
    assert "the outputs of the one after it" in diagnose(_failure(moved), Fixed())


def test_trained_tokens() -> None:
    """Row 1 holds token 13 at position 3; the others hold none."""
    marks: dict[str, Any] = {"marks": ((13,), (99,))}
    actual = _changed(lambda i, p: i == 1 and p >= 3)
    assert "a token that it trains appears" in diagnose(_failure(actual, **marks), Fixed())
    for other in (
        _changed(lambda i, p: i == 1 and p >= 2),
        _changed(lambda _, p: p >= 3),
    ):
        assert "trains" not in diagnose(_failure(other, **marks), Fixed())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i, p: i == 1 and p >= 3, "right before its invocation, wrong from it on"),
        (lambda i, p: i == 1 and p >= 2, "wrong from 1 token(s) before its invocation on"),
        (lambda i, p: i != 1 or p >= 3, "also where its invocation is not"),
    ],
)
def test_an_invocation(change: Callable[[int, int], bool], words: str) -> None:
    failure = _failure(_changed(change), marks=((13, 14),), invoked=True)
    assert words in diagnose(failure, Fixed())


def test_an_invocation_that_is_heard_late() -> None:
    actual = [row.copy() for row in REFERENCE]
    actual[1][3:5] = BASE[1][3:5]
    failure = _failure(actual, marks=((13, 14),), invoked=True)
    assert "the base's outputs for 2 token(s): active too late" in diagnose(failure, Fixed())


def _row(actual: Outputs) -> Failure:
    return _failure(actual, of_mixed=True)


def test_a_row_of_a_mixed_batch() -> None:
    other = _sum((1, BASE), (1, OTHER))
    right = Fixed(each=REFERENCE, same=REFERENCE)
    takes = replace(right, looks={"it does what b does, which other rows have": other})
    said = diagnose(_row(other), takes)
    assert "the row is right; in the mixed batch it does what b does" in said
    leaky = _sum((1, REFERENCE), (0.2, OTHER))
    leaks = replace(right, shares={"b": lambda share: _sum((1, REFERENCE), (share, OTHER))})
    assert "0.2 times b, of another row, leaks into it" in diagnose(_row(leaky), leaks)
    unlike = _sum((1, REFERENCE), (0.2, _random(5)))
    assert "the rows are not kept apart" in diagnose(_row(unlike), leaks)
    said = diagnose(_row(other), Fixed(each=other, same=other))
    assert said == "alone the row gives the same: see the case of its adapter, not the batch"
    padded = diagnose(_row(_changed(lambda i, _: i != 1)), Fixed(each=REFERENCE, same=other))
    assert "padding or mask" in padded


def test_kept_columns_say_the_same() -> None:
    """Of goldens, some columns of the vocabulary are there only."""
    columns = np.broadcast_to(np.arange(0, VOCAB, 3), (99, 11))
    expected = [
        replace(
            expect(y, base),
            columns=columns[: len(y)],
            reference=y[:, ::3],
            base=base[:, ::3],
        )
        for y, base in zip(REFERENCE, BASE, strict=True)
    ]
    bench = Fixed(without=BASE, factors={"a": lambda factor: _bent(factor, 2)})
    said = diagnose(_failure(_bent(1, 2), expected=expected), bench)
    assert "a is scaled by 2 " in said


def test_repairs_change_what_they_name_and_nothing_else() -> None:
    random = np.random.default_rng(0)
    own = {}
    for layer in (0, 1):
        for leaf, size in (("q", 6), ("k", 6), ("up", 9)):
            path = f"lora.layers.{layer}.{leaf}"
            own[f"{path}.A"] = random.standard_normal((6, 3)).astype(np.float32)
            own[f"{path}.B"] = random.standard_normal((3, size)).astype(np.float32)
            own[f"{path}.gate"] = np.ones((1, 1, 1), np.float32)
    found = dict(repairs(own))
    assert {"k and q are exchanged", "the factors of layers 0 and 1 are exchanged"} <= set(found)
    assert "k and up are exchanged" not in found  # of another shape
    assert not any("rsLoRA" in clause for clause in found)  # one rank: a factor like any other
    for clause, tensors in found.items():
        changed = {key for key in own if not np.array_equal(own[key], tensors[key])}
        assert changed, clause
        assert {key: x.shape for key, x in tensors.items()} == {k: x.shape for k, x in own.items()}
        assert not any(key.endswith("gate") for key in changed)
    swapped = found["A and B are swapped"]
    np.testing.assert_array_equal(swapped["lora.layers.0.q.A"], own["lora.layers.0.q.B"].T)
    np.testing.assert_array_equal(swapped["lora.layers.0.up.A"], own["lora.layers.0.up.A"])


def test_a_batch_that_is_too_large_is_no_padding() -> None:
    """Found: a fault in batches of more than four rows was called padding."""
    last = _changed(lambda row, _: row == 2)
    bench = Fixed(without=BASE, each=REFERENCE, most=2, batch=16)
    said = diagnose(_failure(last), bench)
    assert said == (
        "a row alone is right, and so are 2 copies of it, but not 3: batches of more than 2 rows, "
        "not padding"
    )
    assert "more than 1 row, not" in diagnose(_failure(last), replace(bench, most=1))
    padded = diagnose(_failure(last), replace(bench, most=16))
    assert padded.endswith("padding or mask")


def test_rows_that_rest() -> None:
    wrong = _changed(lambda row, position: position == PROMPTS[row] + 1)
    awake = [row[: count + 2] for row, count in zip(REFERENCE, PROMPTS, strict=True)]
    bench = Fixed(without=BASE, each=REFERENCE, waking=awake)
    said = diagnose(_failure(wrong, rested=True), bench)
    assert said.startswith("right where no row of the batch rests, wrong where some do")
    # Without rests that is no reason, nor where what is wrong comes later than was run.
    assert "rests" not in diagnose(_failure(wrong), bench)
    short = [row[:count] for row, count in zip(REFERENCE, PROMPTS, strict=True)]
    assert "rests" not in diagnose(_failure(wrong, rested=True), replace(bench, waking=short))


def test_one_long_row() -> None:
    random = np.random.default_rng(3)
    base, effect, noise = (random.standard_normal((90, VOCAB)).astype(np.float32) for _ in "bes")
    whole = expect(base + effect, base)
    rows = {"rows": [tuple(range(90))], "prompts": [90], "padded": [False]}
    actual = [base + effect + noise * (np.arange(90) >= 70)[:, None]]
    said = diagnose(_failure(actual, expected=[whole], **rows), Fixed())
    assert said.startswith("wrong from position 70: a window, a limit of positions, or a table")
    places = np.array([0, 1, 3, 8, 20, 50, 80, 89])
    kept = [replace(whole.at(places), places=places)]
    said = diagnose(_failure(actual, expected=kept, **rows), Fixed())
    assert said.startswith("wrong from position 80, and right up to 50: a window")
