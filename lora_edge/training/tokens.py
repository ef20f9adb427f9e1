"""Examples -> token ids and labels: what carries loss, what is cut, what is packed together.

Knows a tokenizer; knows nothing of files, models or training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_edge.errors import DataError
from lora_edge.training.data import ChatExample, Example, LabelledExample

IGNORED = -100
"""The label that PyTorch's cross entropy skips."""


@dataclass(frozen=True)
class TokenizedExample:
    """One example as the model sees it.

    Attributes:
        input_ids: prompt and completion, special tokens included.
        labels: the same length; ``IGNORED`` on the prompt and at position 0, which nothing
            predicts; the token ids on the completion.
        cut: tokens that were cut off at the end to respect ``max_length``.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    cut: int

    @property
    def targets(self) -> int:
        """How many tokens carry loss."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class PackedExample:
    """Several examples in one row, each blind to the others.

    Attributes:
        parts: the examples, in their order within the row.
    """

    parts: tuple[TokenizedExample, ...]

    @property
    def input_ids(self) -> tuple[int, ...]:
        """The tokens of all parts."""
        return sum((part.input_ids for part in self.parts), ())

    @property
    def labels(self) -> tuple[int, ...]:
        """The labels of all parts; ``IGNORED`` where a part begins."""
        return sum((part.labels for part in self.parts), ())

    @property
    def positions(self) -> tuple[int, ...]:
        """Position ids, from 0 in each part: by these transformers keeps the parts apart."""
        return sum((tuple(range(len(part.input_ids))) for part in self.parts), ())

    @property
    def targets(self) -> int:
        """How many tokens carry loss."""
        return sum(part.targets for part in self.parts)


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


@dataclass(frozen=True)
class ImageExample:
    """One image, read and scaled when a batch is made.

    Attributes:
        path: its file.
        label: index of its class.
    """

    path: str
    label: int


Tokenized = TokenizedExample | PackedExample | ClassifiedExample | ImageExample


def tokenize(
    examples: Sequence[Example | ChatExample],
    tokenizer: Any,
    max_length: int,
    *,
    drop: Callable[[str], None] | None = None,
) -> tuple[TokenizedExample, ...]:
    """Encode examples: ``labels`` cover the completion, or the assistant's turns, and their end.

    A prompt's tokens are found by encoding it alone, as it will be at inference; they must be the
    first tokens of the whole, or the model would be trained on a boundary that it never meets.

    Args:
        examples: what :func:`~lora_edge.training.data.read_data` read.
        tokenizer: a transformers tokenizer with an end token.
        max_length: tokens per example; what goes beyond is cut at the end.
        drop: told of an example that has no target token left, which is then left out; ``None``:
            refuse it.

    Raises:
        DataError: no end token; no chat template for a chat; a prompt whose tokens are not a
            prefix of the whole; an example, or with ``drop`` all of them, without a target token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError(
            "the base's tokenizer has no end token, so a completion could not be ended",
            "Set eos_token in the base's tokenizer_config.json.",
        )
    made = []
    for example in examples:
        if isinstance(example, ChatExample):
            ids, labels = _chat(example, tokenizer, end)
        else:
            ids, labels = _pair(example, tokenizer, end)
        one = TokenizedExample(
            tuple(ids[:max_length]),
            (IGNORED, *labels[1:max_length]),
            max(0, len(ids) - max_length),
        )
        if one.targets:
            made.append(one)
            continue
        first = next((index for index, label in enumerate(labels) if label != IGNORED), len(ids))
        problem = (
            f"{example.where}: no token of the completion is left within {max_length} tokens "
            f"(the prompt has {first})"
        )
        if drop is None:
            raise DataError(
                problem, "Raise --max-length, shorten the prompt, or give --drop-too-long."
            )
        drop(problem)
    if not made:
        raise DataError(f"no example is left within {max_length} tokens", "Raise --max-length.")
    return tuple(made)


def classify(
    examples: Sequence[LabelledExample], labels: Sequence[str], tokenizer: Any, max_length: int
) -> tuple[ClassifiedExample, ...]:
    """Encode texts with the special tokens that the tokenizer puts around them.

    Args:
        examples: what :func:`~lora_edge.training.data.read_data` read.
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


def pack(examples: Sequence[TokenizedExample], max_length: int) -> tuple[PackedExample, ...]:
    """Rows of up to ``max_length`` tokens: longest first, each into the fullest row that takes it.

    The same examples give the same rows.
    """
    rows: list[list[TokenizedExample]] = []
    by_room: list[list[int]] = [[] for _ in range(max_length + 1)]
    for example in sorted(examples, key=lambda one: -len(one.input_ids)):
        size = len(example.input_ids)
        room = next((room for room in range(size, max_length + 1) if by_room[room]), max_length)
        if by_room[room]:
            row = by_room[room].pop()
            rows[row].append(example)
        else:
            row = len(rows)
            rows.append([example])
        by_room[room - size].append(row)
    return tuple(PackedExample(tuple(row)) for row in rows)


def _pair(example: Example, tokenizer: Any, end: int) -> tuple[list[int], list[int]]:
    prompt = _encode(tokenizer, example.prompt, end)
    ids = _encode(tokenizer, example.prompt + example.completion, end)
    if ids[: len(prompt)] != prompt:
        raise DataError(
            f"{example.where}: the tokenizer joins the end of the prompt to the completion's start",
            "Put the space or line break between the two at the start of the completion.",
        )
    ids.append(end)
    return ids, [IGNORED] * len(prompt) + ids[len(prompt) :]


def _encode(tokenizer: Any, text: str, end: int) -> list[int]:
    # Some tokenizers put the end token after every text by themselves.
    ids = list(tokenizer(text, truncation=False, verbose=False)["input_ids"])
    return ids[:-1] if ids and ids[-1] == end and not text.endswith(tokenizer.eos_token) else ids


def _chat(example: ChatExample, tokenizer: Any, end: int) -> tuple[list[int], list[int]]:
    """Each assistant turn from where the template opens it to the end token that closes it."""
    whole = _rendered(example, len(example.messages), tokenizer, opened=False)
    labels = [IGNORED] * len(whole)
    last = 0
    for index, (role, _) in enumerate(example.messages):
        if role != "assistant":
            continue
        opened = _rendered(example, index, tokenizer, opened=True)
        closed = _rendered(example, index + 1, tokenizer, opened=False)
        if closed[: len(opened)] != opened or whole[: len(closed)] != closed:
            raise DataError(
                f"{example.where}: the chat template writes message {index} otherwise within the "
                "whole conversation than up to it, so what the assistant says cannot be found",
                "Split the conversation after this turn, or give prompt and completion.",
            )
        turn = closed[len(opened) :]
        if end in turn:  # what the template puts after it, a line break, is never generated
            turn = turn[: len(turn) - turn[::-1].index(end)]
        last = len(opened) + len(turn)
        labels[len(opened) : last] = turn
    if whole[last - 1] != end and last == len(whole):
        whole.append(end)
        labels.append(end)
    return whole, labels


def _rendered(example: ChatExample, count: int, tokenizer: Any, *, opened: bool) -> list[int]:
    """Token ids of the first ``count`` messages; ``opened``: and of the assistant's opening."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{example.where}: the base's tokenizer has no chat template for 'messages'",
            "Give prompt and completion, or add chat_template.jinja to the base's folder.",
        )
    messages = [{"role": role, "content": text} for role, text in example.messages[:count]]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
    except Exception as error:  # a template raises what it likes, often jinja2's TemplateError
        raise DataError(
            f"{example.where}: the chat template refuses these messages: {error}",
            "See the template for the roles and the order that it takes.",
        ) from error
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
