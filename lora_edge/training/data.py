"""jsonl -> token ids and labels.

``{"prompt", "completion"}`` trains a generator, with loss on the completion only; ``{"text",
"label"}`` trains a classifier.

Knows files and a tokenizer; knows nothing of models or training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_edge.errors import DataError

IGNORED = -100
"""The label that PyTorch's cross entropy skips."""

_FORMAT_HINT = (
    'Each line is a JSON object: {"prompt": "…", "completion": "…"} for a generator, or '
    '{"text": "…", "label": "…"} for a classifier.'
)
_PAIR = ("prompt", "completion")
_LABELLED = ("text", "label")


@dataclass(frozen=True)
class Example:
    """One line of the data.

    Attributes:
        prompt: the text that the model is given; no loss on it.
        completion: the text that it shall answer with, without an end token; not empty.
        where: ``FILE:LINE``, for messages.
    """

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True)
class LabelledExample:
    """One line of a classifier's data.

    Attributes:
        text: what is classified; not empty.
        label: the name of its class.
        where: ``FILE:LINE``, for messages.
    """

    text: str
    label: str
    where: str


@dataclass(frozen=True)
class TokenizedExample:
    """One example as the model sees it.

    Attributes:
        input_ids: prompt and completion, special tokens included.
        labels: the same length; ``IGNORED`` on the prompt, the token ids on the completion.
        cut: tokens that were cut off at the end to respect ``max_length``.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    cut: int

    @property
    def targets(self) -> int:
        """How many tokens carry loss (a label at position 0 is never predicted)."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class ClassifiedExample:
    """One text as the model sees it.

    Attributes:
        input_ids: special tokens included.
        type_ids: as long; all 0 for one text.
        label: index of its class.
        cut: tokens that were cut off to respect ``max_length``.
    """

    input_ids: tuple[int, ...]
    type_ids: tuple[int, ...]
    label: int
    cut: int


Tokenized = TokenizedExample | ClassifiedExample


@dataclass(frozen=True)
class DataFile:
    """The lines of one file, in its order.

    Attributes:
        path: the file.
        sha256: of its bytes.
        examples: prompts and completions; empty for a classifier's data.
        labelled: texts and labels; empty for a generator's data.
        labels: the distinct labels, numbers by size and names by the alphabet.
    """

    path: Path
    sha256: str
    examples: tuple[Example, ...] = ()
    labelled: tuple[LabelledExample, ...] = ()
    labels: tuple[str, ...] = ()


def read_data(path: Path) -> DataFile:
    """Read a jsonl file; its first line says whether it is a generator's or a classifier's data.

    Blank lines and other keys are passed over.

    Raises:
        DataError: no such file, nothing in it, one label only, or a line that is not UTF-8, not a
            JSON object, or lacks one of its two fields; the message names the first such line and
            counts the others.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}", "Give a jsonl file."
        ) from error
    examples: list[Example] = []
    labelled: list[LabelledExample] = []
    numbers: set[bool] = set()
    problems: list[str] = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = _row(line)
            keys = _keys(row, bool(labelled), bool(examples))
            if keys == _PAIR:
                examples.append(Example(*_texts(row, keys), where))
            else:
                is_number = _is_number(row["label"])
                row["label"] = str(row["label"]) if is_number else row["label"]
                labelled.append(LabelledExample(*_texts(row, keys), where))
                numbers.add(is_number)
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        more = f" (and {len(problems) - 1} more bad lines)" if len(problems) > 1 else ""
        raise DataError(problems[0] + more, _FORMAT_HINT)
    if not examples and not labelled:
        raise DataError(f"{path} holds no examples", _FORMAT_HINT)
    labels = {example.label for example in labelled}
    if labelled and (len(labels) < 2 or len(numbers) > 1):
        what = "labels of two kinds, numbers and names" if len(numbers) > 1 else "one label only"
        raise DataError(f"{path} holds {what}", "Give every class a label of its own, all alike.")
    return DataFile(
        path,
        hashlib.sha256(content).hexdigest(),
        tuple(examples),
        tuple(labelled),
        tuple(sorted(labels, key=int if numbers == {True} else str)),
    )


def tokenize(
    examples: Sequence[Example], tokenizer: Any, max_length: int
) -> tuple[TokenizedExample, ...]:
    """Encode examples: ``labels`` cover the completion and the end token that is put after it.

    The prompt's tokens are found by encoding it alone, as it will be at inference; they must be the
    first tokens of the whole, or the model would be trained on a boundary that it never meets.

    Args:
        examples: what :func:`read_data` read.
        tokenizer: a transformers tokenizer with an end token.
        max_length: tokens per example; what goes beyond is cut at the end.

    Raises:
        DataError: no end token; a prompt whose tokens are not a prefix of the whole; an example
            that has no target token left.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError(
            "the base's tokenizer has no end token, so a completion could not be ended",
            "Set eos_token in the base's tokenizer_config.json.",
        )
    return tuple(_tokenize_one(example, tokenizer, end, max_length) for example in examples)


def classify(
    examples: Sequence[LabelledExample], labels: Sequence[str], tokenizer: Any, max_length: int
) -> tuple[ClassifiedExample, ...]:
    """Encode texts with the special tokens that the tokenizer puts around them.

    Args:
        examples: what :func:`read_data` read.
        labels: the labels by index.
        tokenizer: a transformers tokenizer.
        max_length: tokens per text; what goes beyond is cut at its end, special tokens are kept.
    """
    index = {label: number for number, label in enumerate(labels)}
    made = []
    for example in examples:
        whole = len(tokenizer(example.text, verbose=False)["input_ids"])
        coded = tokenizer(example.text, truncation=True, max_length=max_length)
        ids = tuple(coded["input_ids"])
        types = tuple(coded.get("token_type_ids", (0,) * len(ids)))
        made.append(ClassifiedExample(ids, types, index[example.label], whole - len(ids)))
    return tuple(made)


def _tokenize_one(example: Example, tokenizer: Any, end: int, max_length: int) -> TokenizedExample:
    prompt = _encode(tokenizer, example.prompt, end)
    ids = _encode(tokenizer, example.prompt + example.completion, end)
    if ids[: len(prompt)] != prompt:
        raise DataError(
            f"{example.where}: the tokenizer joins the end of the prompt to the completion's start",
            "Put the space or line break between the two at the start of the completion.",
        )
    ids.append(end)
    labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
    made = TokenizedExample(
        tuple(ids[:max_length]), tuple(labels[:max_length]), max(0, len(ids) - max_length)
    )
    if made.targets == 0:
        raise DataError(
            f"{example.where}: no token of the completion is left within {max_length} tokens "
            f"(the prompt has {len(prompt)})",
            "Raise --max-length or shorten the prompt.",
        )
    return made


def _encode(tokenizer: Any, text: str, end: int) -> list[int]:
    # Some tokenizers put the end token after every text by themselves.
    ids = list(tokenizer(text, truncation=False, verbose=False)["input_ids"])
    return ids[:-1] if ids and ids[-1] == end and not text.endswith(tokenizer.eos_token) else ids


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("not a flat JSON object") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    return row


def _keys(row: dict[str, Any], labelled: bool, paired: bool) -> tuple[str, str]:
    """The two fields of a line; those of the lines before it, where there are any."""
    for keys, others in ((_PAIR, labelled), (_LABELLED, paired)):
        if not others and all(key in row for key in keys):
            return keys
    allowed = [keys for keys, others in ((_PAIR, labelled), (_LABELLED, paired)) if not others]
    wanted = " or ".join(f"{first!r} and {second!r}" for first, second in allowed)
    raise ValueError(f"expected the keys {wanted}, got {', '.join(map(repr, row)) or 'none'}")


def _is_number(label: Any) -> bool:
    return isinstance(label, int) and not isinstance(label, bool)


def _texts(row: dict[str, Any], keys: tuple[str, str]) -> tuple[str, str]:
    for key in keys:
        if not isinstance(row[key], str):
            raise ValueError(f"{key!r} is {type(row[key]).__name__}, expected a text")
        try:
            row[key].encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{key!r} holds a lone surrogate, which is no text") from error
    # A prompt may be empty: the model then writes from nothing.
    for key in keys:
        if not row[key] and key != "prompt":
            raise ValueError(f"{key!r} is empty")
    first, second = keys
    return row[first], row[second]
