"""A verdict says how far it goes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lora_edge.parity.engine import validate
from lora_edge.parity.plan.reach import Reach

FAR = Reach(396, 64, 404, 512, (1, 2, 4, 8, 16), 207, 264, 3, 3, ("0.7 a + 0.3 b",), True)


def test_what_was_reached_and_what_was_not_in_one_line() -> None:
    line = FAR.line()
    assert "\n" not in line
    reached, _, left = line.partition(" Not reached: ")
    assert reached == (
        "Reached: prompts of up to 396 tokens and 64 decoded, batches of 1, 2, 4, 8 and 16, 207 of "
        "264 tokens of the vocabulary, the blend 0.7 a + 0.3 b."
    )
    assert left == (
        "rows of more than 404 of the model's 512 tokens, more than 64 decoded tokens, batches of "
        "more than 16, 21.6 % of the vocabulary, other blends and weights."
    )


@pytest.mark.parametrize(
    ("changes", "left", "words"),
    [
        ({"row": 512}, False, "rows of more"),
        ({"model": None}, True, "rows of more than 404 tokens"),
        ({"long": 1}, True, "prompts of more than 64 tokens of 2 of 3 adapters"),
        ({"tokens": 264}, False, "of the vocabulary"),
        ({"decoded": 0}, False, "decoded"),
        ({"blends": ()}, True, ", blends and weights"),
        ({"blends": (), "others": False}, False, "blends"),
        ({"vocabulary": 0, "tokens": 0, "prompt": 0, "row": 0}, False, "token"),
    ],
)
def test_what_there_is_nothing_of_is_not_said(
    changes: dict[str, object], left: bool, words: str
) -> None:
    line = dataclasses.replace(FAR, **changes).line()  # type: ignore[arg-type]
    assert (words in line.partition(" Not reached: ")[2]) == left


def test_nothing_is_nothing() -> None:
    empty = Reach(0, 0, 0, None, (), 0, 0, 0, 0, (), False)
    assert empty.line() == "Reached: nothing."


def test_a_report_says_how_far_it_goes(made: Any) -> None:
    whole, quick = (validate(made.switchable["fused"], depth=x) for x in ("normal", "quick"))
    assert whole.reach is not None
    assert quick.reach is not None
    assert whole.reach.batches == (1, 2, 4, 8, 16)
    assert whole.reach.prompt == 120 > quick.reach.prompt
    assert (whole.reach.model, whole.reach.vocabulary, whole.reach.long) == (128, 256, 2)
    assert whole.reach.blends == ("0.7 narrow + 0.3 rooted", "0.8 narrow - 0.5 rooted")
    assert (whole.reach.decoded, quick.reach.decoded) == (64, 8)
    assert 0.3 < whole.reach.tokens / 256 <= 1
    assert whole.table().endswith(f"\n{whole.reach.line()}\n")
    assert whole.to_data()["reach"]["line"] == whole.reach.line()
    merged = validate(made.merged).reach
    assert merged is not None
    assert (merged.batches, merged.blends, merged.others) == ((1, 2, 4, 16), (), False)
