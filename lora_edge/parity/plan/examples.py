"""The user's own prompts and labelled examples, from files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from lora_edge.errors import DataError
from lora_edge.files.json import read_lines
from lora_edge.files.jsonl import read_jsonl

_HINT = "Give a jsonl file."


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the adapter that it is for; ``None``: all of them, and the base."""

    text: str
    adapter: str | None = None


@dataclass(frozen=True)
class Example:
    """What is asked, what the right answer is, and the adapter that it is for (``None``: all)."""

    text: str
    answer: str
    adapter: str | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts from a file: lines of text, or of JSON ``{"prompt": …, "adapter": …}`` (``.jsonl``).

    Raises:
        DataError: the file is missing, is no UTF-8, holds no prompt, or a line is none.
    """
    if path.suffix != ".jsonl":
        found = [
            Prompt(text) for _, text in read_lines(path, DataError, "Give a text or jsonl file.")
        ]
    else:
        found = []
        for line in read_jsonl(path, DataError, _HINT):
            data = line.object(DataError, _HINT)
            text, adapter = data.get("prompt"), data.get("adapter")
            if not _is_text(text) or not isinstance(adapter, str | None):
                raise DataError(
                    f"{line.where}: expected a text 'prompt', and an 'adapter' or none",
                    'For example {"prompt": "Dear Sir", "adapter": "polite"}.',
                )
            found.append(Prompt(text, adapter))
    if not found:
        raise DataError(f"{path} holds no prompt", "Give one prompt in each line.")
    return found


def read_examples(path: Path) -> list[Example]:
    """Examples from a ``.jsonl``: ``{"prompt", "completion"}`` or ``{"text", "label"}``.

    Each may have an ``adapter`` besides.

    Raises:
        DataError: the file is missing, is no UTF-8, holds no example, or a line is none.
    """
    found = []
    for line in read_jsonl(path, DataError, _HINT):
        data = line.object(DataError, _HINT)
        text = data.get("prompt", data.get("text"))
        answer = data.get("completion", data.get("label"))
        answer = str(answer) if isinstance(answer, int) else answer
        adapter = data.get("adapter")
        if not (_is_text(text) and _is_text(answer)) or not isinstance(adapter, str | None):
            raise DataError(
                f"{line.where}: expected 'prompt' and 'completion', or 'text' and 'label'",
                'For example {"prompt": "Word: river Answer:", "completion": " river river"}.',
            )
        found.append(Example(text, answer, adapter))
    if not found:
        raise DataError(f"{path} holds no example", "Give one in each line.")
    return found


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value)
