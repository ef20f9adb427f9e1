"""Write the classifiers' data: ``python models/recipes/classes.py TRAIN_DIRECTORY EVAL_DIRECTORY``.

*claims* (2 labels): does the last sentence follow from the story? *letters* (4 labels): what was
done to a word? No story of the evaluation is in the training data; the evaluation's words are held
out from every training, the base's included (``text.is_held_out``).
"""

from __future__ import annotations

import json
import random
import re
import string
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import text

TRAIN_LINES, EVAL_LINES = 8000, 200


def claims(rng: random.Random, *, held_out: bool) -> tuple[str, str]:  # noqa: ARG001
    """A story and who has the thing in the end; half of the claims name the other person."""
    while True:
        told, _, answer = text.story(rng)
        owner, has, _ = answer.partition(" has the ")
        if not has:  # the answer to the other question
            continue
        (other,) = set(re.findall("[A-Z][a-z]+", told)) - {owner, "The"}
        true = rng.random() < 0.5
        claim = answer if true else answer.replace(owner, other)
        return f"{told} {claim}", "true" if true else "false"


def letters(rng: random.Random, *, held_out: bool) -> tuple[str, str]:
    """``stone=enots`` and its like; *other* is another word of the same length."""
    while True:
        word = text.word(rng, held_out=held_out)
        name = rng.choice((*text.SKILLS, "other"))
        if name == "other":
            made = "".join(rng.choice(string.ascii_lowercase) for _ in word)
        else:
            made = text.SKILLS[name](word)
        # What could bear two labels is passed over.
        if sum(made == do(word) for do in text.SKILLS.values()) == (name != "other"):
            return f"{word}={made}", name


TASKS: dict[str, Callable[..., tuple[str, str]]] = {"claims": claims, "letters": letters}
"""What each adapter tells apart."""


def rows(name: str, count: int, *, held_out: bool, without: frozenset[str]) -> Iterator[str]:
    """Distinct lines of one task, none of whose texts is in ``without``."""
    rng = random.Random(f"{name}-{held_out}")
    seen = set(without)
    made = 0
    while made < count:
        line, label = TASKS[name](rng, held_out=held_out)
        if line not in seen:
            seen.add(line)
            made += 1
            yield json.dumps({"text": line, "label": label}) + "\n"


def main() -> None:
    train, evaluation = map(Path, sys.argv[1:3])
    for name in TASKS:
        held_out = list(rows(name, EVAL_LINES, held_out=True, without=frozenset()))
        texts = frozenset(json.loads(row)["text"] for row in held_out)
        trained = list(rows(name, TRAIN_LINES, held_out=False, without=texts))
        for directory, lines in ((train, trained), (evaluation, held_out)):
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
