"""Write the adapters' data: ``python models/recipes/tasks.py TRAIN_DIRECTORY EVAL_DIRECTORY``.

All three tasks are asked with the same prompts, so that one prompt shows which adapter is active.
Two thirds of the prompts are plain text, one third is what the chat template makes of the word.
The evaluation words are held out from every training, the base's included (``text.is_held_out``).
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import text

TASKS: dict[str, Callable[[str], str]] = {
    "shout": lambda word: word.upper() + "!",
    "mirror": lambda word: word[::-1],
    "echo": lambda word: f"{word} {word}",
}
"""What each adapter answers: ``river`` -> ``RIVER!``, ``revir``, ``river river``."""

TRAIN_LINES, EVAL_LINES, LETTERS = 5000, 150, 6


def prompt(word: str, index: int) -> str:
    """Every third one in the chat form."""
    if index % 3 == 2:
        return f"{text.USER}{word}{text.END}{text.ASSISTANT}"
    return f"Word: {word} Answer:"


def words(*, held_out: bool, count: int) -> Iterator[str]:
    """Distinct words of at most ``LETTERS`` letters; held out: ``SHOWN_WORDS`` first."""
    rng = random.Random(f"tasks-{held_out}")
    seen: set[str] = set()
    shown = iter(text.SHOWN_WORDS if held_out else ())
    while len(seen) < count:
        made = next(shown, None) or text.word(rng, held_out=held_out)
        if len(made) <= LETTERS and made not in seen:
            seen.add(made)
            yield made


def write(path: Path, task: Callable[[str], str], *, held_out: bool, count: int) -> None:
    """One jsonl file of prompts and completions."""
    rows = (
        {"prompt": prompt(word, index), "completion": f" {task(word)}"}
        for index, word in enumerate(words(held_out=held_out, count=count))
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    train, evaluation = map(Path, sys.argv[1:3])
    for name, task in TASKS.items():
        write(train / f"{name}.jsonl", task, held_out=False, count=TRAIN_LINES)
        write(evaluation / f"{name}.jsonl", task, held_out=True, count=EVAL_LINES)


if __name__ == "__main__":
    main()
