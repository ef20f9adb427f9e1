"""Files of examples: jsonl and csv -> texts, pairs, chats or labelled texts, each with its line.

Knows files; knows nothing of tokenizers, models or training.
"""

from __future__ import annotations

import csv
import hashlib
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_edge.errors import DataError
from lora_edge.files.json import parse_json, read_bytes
from lora_edge.files.jsonl import split_lines

Kind = Literal["text", "pair", "chat", "labelled", "image"]

KEYS: Mapping[Kind, tuple[str, ...]] = {
    "chat": ("messages",),
    "pair": ("prompt", "completion"),
    "labelled": ("text", "label"),
    "text": ("text",),
}
"""Kind -> the fields of a line, in the order in which a line is tried."""

_FORMAT_HINT = (
    'Each line is a JSON object (or a csv row with such columns): {"prompt", "completion"}, '
    '{"messages": [{"role", "content"}]} or {"text"} for a generator, {"text", "label"} for a '
    "classifier."
)


@dataclass(frozen=True)
class Example:
    """A prompt and its answer.

    Attributes:
        prompt: the text that the model is given; no loss on it; empty for plain text.
        completion: the text that it shall answer with, without an end token; not empty.
        where: ``FILE:LINE``, for messages.
    """

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True)
class ChatExample:
    """A conversation.

    Attributes:
        messages: role and content of each turn; at least one is the assistant's.
        where: ``FILE:LINE``, for messages.
    """

    messages: tuple[tuple[str, str], ...]
    where: str


@dataclass(frozen=True)
class LabelledExample:
    """One line of a classifier's data.

    Attributes:
        text: what is classified, not empty; of an image the path of its file.
        label: the name of its class.
        where: ``FILE:LINE``, for messages.
    """

    text: str
    label: str
    where: str


Row = Example | ChatExample | LabelledExample


@dataclass(frozen=True)
class DataFile:
    """The examples of one file, in its order.

    Attributes:
        path: the file, or the folder of images.
        sha256: of its bytes; of a folder, of its files' names and bytes.
        kind: what its lines are.
        rows: the examples: of :class:`Example` for ``text`` and ``pair``.
        labels: the distinct labels, numbers by size and names by the alphabet; empty for a
            generator's data.
    """

    path: Path
    sha256: str
    kind: Kind
    rows: tuple[Row, ...]
    labels: tuple[str, ...] = ()


def read_data(path: Path, labels: Sequence[str] | None = None) -> DataFile:
    """Read a jsonl or csv file; its first line says what kind of data it is.

    Blank lines and other fields are passed over. A file is csv if it is called so.

    Args:
        path: the file, UTF-8.
        labels: of the data that was trained on; others are refused. ``None``: these are they.

    Raises:
        DataError: no such file, nothing in it, one label only, or a line that is not UTF-8, not a
            JSON object, or lacks a field; the message names the first such line and counts the
            others.
    """
    content = read_bytes(
        path, DataError, "Give a jsonl or csv file.", max_bytes=sys.maxsize, pipe=True
    )
    parsed = _csv_rows if path.suffix.lower() == ".csv" else _json_rows
    rows: list[Row] = []
    numbers: set[bool] = set()
    problems: list[str] = []
    kind: Kind | None = None
    for where, row in parsed(content, path):
        if isinstance(row, DataError):
            problems.append(str(row))
            continue
        try:
            found = _kind(row, kind)
            made, is_number = _row(found, row, where)
            if labels is not None and isinstance(made, LabelledExample):
                check_label(made.label, labels)
        except ValueError as error:
            problems.append(f"{where}: {error}")
        else:
            kind = found
            rows.append(made)
            numbers.add(is_number)
    if problems:
        more = f" (and {len(problems) - 1} more bad lines)" if len(problems) > 1 else ""
        raise DataError(problems[0] + more, _FORMAT_HINT)
    if kind is None:
        raise DataError(f"{path} holds no examples", _FORMAT_HINT)
    if path.suffix.lower() == ".csv":  # where numbers are texts too
        numbers = {all(row.label.isdecimal() for row in rows if isinstance(row, LabelledExample))}
    return DataFile(
        path,
        hashlib.sha256(content).hexdigest(),
        kind,
        tuple(rows),
        label_order(path, rows, numbers) if labels is None else tuple(labels),
    )


def label_order(path: Path, rows: Sequence[Row], numbers: set[bool]) -> tuple[str, ...]:
    """The distinct labels in the order of the head's outputs; empty for a generator's data.

    Args:
        path: for messages.
        rows: the examples.
        numbers: whether labels were numbers; both where some were and some were not.

    Raises:
        DataError: fewer than two labels, or numbers beside names.
    """
    found = {row.label for row in rows if isinstance(row, LabelledExample)}
    if found and (len(found) < 2 or len(numbers) > 1):
        what = "labels of two kinds, numbers and names" if len(numbers) > 1 else "one label only"
        raise DataError(f"{path} holds {what}", "Give every class a label of its own, all alike.")
    return tuple(sorted(found, key=int if numbers == {True} else str))


def _json_rows(content: bytes, path: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """Where each line is, and what it holds or what is wrong with it."""
    for line in split_lines(content, path):
        try:
            yield line.where, line.object(DataError, _FORMAT_HINT)
        except DataError as error:
            yield line.where, error


def _csv_rows(content: bytes, path: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """As :func:`_json_rows`."""
    for number, row in _csv_cells(content):
        where = f"{path}:{number}"
        if isinstance(row, ValueError):
            yield where, DataError(f"{where}: {row}", _FORMAT_HINT)
        else:
            yield where, row


def _csv_cells(content: bytes) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        byte = error.start - (before.rfind(b"\n") + 1)
        yield before.count(b"\n") + 1, ValueError(f"not UTF-8 (byte {byte + 1} of the line)")
        return
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            # A quoted cell may span lines; the row is named by its first.
            number, start = start, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if columns is None:
                columns = [cell.strip() for cell in cells]
                if not any(all(key in columns for key in keys) for keys in KEYS.values()):
                    yield number, ValueError(f"expected the columns {_wanted(None)}, got {columns}")
                    return
            elif len(cells) != len(columns):
                yield number, ValueError(f"{len(cells)} cells, expected {len(columns)}")
            else:
                yield number, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        yield start, ValueError(f"not csv: {error}")


def _kind(row: Mapping[str, Any], before: Kind | None) -> Kind:
    """The kind of a line: that of the lines before it, where there are any."""
    for kind, keys in KEYS.items():
        if before in (None, kind) and all(key in row for key in keys):
            return kind
    raise ValueError(
        f"expected the keys {_wanted(before)}, got {', '.join(map(repr, row)) or 'none'}"
    )


def _wanted(before: Kind | None) -> str:
    return " or ".join(
        " and ".join(map(repr, keys)) for kind, keys in KEYS.items() if before in (None, kind)
    )


def _row(kind: Kind, row: Mapping[str, Any], where: str) -> tuple[Row, bool]:
    """The example of a line, and whether its label is a number."""
    if kind == "chat":
        return ChatExample(_messages(row["messages"]), where), False
    if kind == "text":
        return Example("", _text(row, "text"), where), False
    if kind == "pair":
        # A prompt may be empty: the model then writes from nothing.
        prompt = _text(row, "prompt", empty=True)
        return Example(prompt, _text(row, "completion"), where), False
    is_number = isinstance(row["label"], int) and not isinstance(row["label"], bool)
    label = str(row["label"]) if is_number else _text(row, "label")
    return LabelledExample(_text(row, "text"), label, where), is_number


def _messages(value: Any) -> tuple[tuple[str, str], ...]:
    if isinstance(value, str):  # a cell of a csv file
        try:
            value = parse_json(value, "'messages'", DataError, _FORMAT_HINT)
        except DataError as error:
            raise ValueError(str(error)) from error
    if not isinstance(value, list) or not value:
        raise ValueError("'messages' is not a list of turns, or an empty one")
    turns = []
    for index, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise ValueError(f"message {index} is {type(turn).__name__}, expected an object")
        if not {"role", "content"} <= set(turn):
            raise ValueError(
                f"message {index}: expected the keys 'role' and 'content', got "
                f"{', '.join(map(repr, turn)) or 'none'}"
            )
        turns.append((_text(turn, "role"), _text(turn, "content", empty=True)))
    if not any(role == "assistant" and content for role, content in turns):
        raise ValueError("'messages' has no turn of the role 'assistant' that says anything")
    return tuple(turns)


def _text(row: Mapping[str, Any], key: str, *, empty: bool = False) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {type(value).__name__}, expected a text")
    if not value and not empty:
        raise ValueError(f"{key!r} is empty")
    return value


def check_label(label: str, labels: Sequence[str]) -> None:
    """Refuse a label that was not trained on.

    Raises:
        ValueError: it is not among ``labels``.
    """
    if label not in labels:
        raise ValueError(f"the label {label!r} is not among those trained: {', '.join(labels)}")
