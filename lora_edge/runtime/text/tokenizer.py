"""Text <-> token ids with the bundle's own ``tokenizer.json`` and chat templates.

The export has seen to it that these files say what transformers makes of the model's own
(:mod:`lora_edge.exporting.texts`); here they are read, and nothing is guessed.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tokenizers

from lora_edge.errors import BundleError, DataError
from lora_edge.files.json import read_object
from lora_edge.files.tokenizer import read_templates
from lora_edge.runtime.text.text import Message

if TYPE_CHECKING:
    from lora_edge.runtime.text.chat import ChatTemplates

_AGAIN = "Copy it again."


class Encoded(NamedTuple):
    """An encoded text, or pair of texts.

    Attributes:
        ids: token ids, special tokens included.
        type_ids: which of the two texts each token is of: 0 or 1.
        offsets: ``(start, end)`` of each token in its text, in characters; ``(0, 0)`` for special
            tokens.
    """

    ids: list[int]
    type_ids: list[int]
    offsets: list[tuple[int, int]]


class Tokenizer:
    """The tokenizer of a model folder.

    Args:
        directory: a folder with ``tokenizer.json`` and, where the model has them,
            ``tokenizer_config.json``, ``special_tokens_map.json``, ``chat_template.jinja`` and
            ``additional_chat_templates/``.
        over: a folder whose files count before those of ``directory``: what an adapter brings.

    Raises:
        BundleError: there is no tokenizer, or it cannot be read.
    """

    def __init__(self, directory: Path, over: Path | None = None) -> None:
        self.directory = directory
        self._folders = (directory,) if over is None else (over, directory)
        path = self._file("tokenizer.json")
        if path is None:
            raise BundleError(
                f"{directory} has no tokenizer.json",
                "Use token ids (logits, generate_ids), or export a base that has one.",
            )
        with _panics(BundleError, f"{path} cannot be read", _AGAIN), _silent_stderr():
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # Both may be saved in the file; they are the training's affair.
        truncation = self._tokenizer.truncation or {}
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = self._file("tokenizer_config.json")
        self._config = {} if config is None else _read(config)
        side = self._config.get("truncation_side", truncation.get("direction", "right"))
        self._truncation_side = "left" if str(side).lower() == "left" else "right"
        self._tokenizer.encode_special_tokens = self._config.get("split_special_tokens") is True
        kind = type(self._tokenizer.model).__name__
        self._clean = self._config.get("clean_up_tokenization_spaces") is True and (
            kind != "BPE"
            or self._config.get(
                "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
            )
            is True
        )
        self._check()

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the added ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @cached_property
    def special_tokens(self) -> Mapping[str, str]:
        """Name -> text: ``bos_token``, ``eos_token``, ..., and those that the model has besides.

        Templates see them as variables.
        """
        config = self._file("tokenizer_config.json")
        folder = self._folders[-1] if config is None else config.parent
        legacy = folder / "special_tokens_map.json"
        named = dict(self._config)
        if legacy.is_file() and "added_tokens_decoder" not in self._config:
            named |= _read(legacy)
        extra = named.get("extra_special_tokens")
        named |= extra if isinstance(extra, Mapping) else {}
        names = [name for name in named if name.endswith("_token")]
        names += list(extra) if isinstance(extra, Mapping) else []
        texts = {name: _text(named[name]) for name in names}
        return {name: text for name, text in texts.items() if text is not None}

    @cached_property
    def templates(self) -> Mapping[str, str]:
        """Name -> chat template; empty where the model has none."""
        for folder in self._folders:
            found = read_templates(folder)
            if found:
                return found
        return {}

    def vocabulary(self) -> dict[str, int]:
        """Token -> id, the added ones included."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def meaning(self) -> tuple[object, ...]:
        """What decides ids and text; equal tokenizers share it, whatever else their files say."""
        special = {name: x for name, x in self.special_tokens.items() if name != "pad_token"}
        split = self._tokenizer.encode_special_tokens
        return self._tokenizer.to_str(), special, self._clean, split, self._truncation_side

    def token_id(self, text: str) -> int | None:
        """The id of a token, by its text."""
        found = self._tokenizer.token_to_id(text)
        return None if found is None else int(found)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids; ``special_tokens`` adds what the tokenizer itself puts around a text.

        Raises:
            DataError: the text is none, or holds a lone surrogate, which no UTF-8 has.
        """
        with _encoding((text,)):
            return list(self._tokenizer.encode(text, add_special_tokens=special_tokens).ids)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens."""
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    @cached_property
    def _lowered(self) -> tokenizers.Tokenizer:
        """The tokenizer with letters lowered first, as sentence-transformers does it."""
        found = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        steps = json.loads(found.to_str())["normalizer"] or {}
        kinds = [step.get("type") for step in (steps, *steps.get("normalizers", ()))]
        if "Lowercase" not in kinds:
            own = found.normalizer
            lower = tokenizers.normalizers.Lowercase()
            found.normalizer = tokenizers.normalizers.Sequence([lower, *([own] if own else [])])
        return found

    def encode_input(
        self,
        text: str,
        pair: str | None = None,
        *,
        max_length: int | None = None,
        lower_case: bool = False,
    ) -> Encoded:
        """What an encoder reads of a text, or of two.

        Args:
            text: the text.
            pair: a second text, which the tokenizer puts behind it; an empty one is none.
            max_length: cut the texts (the longer one first) to this many tokens, special ones
                included; ``None``: never.
            lower_case: lower the letters first, whatever the tokenizer itself does; special tokens
                in the text stay.

        Raises:
            DataError: as :meth:`encode`; or ``max_length`` leaves no room for the special tokens.
        """
        tokenizer = self._lowered if lower_case else self._tokenizer
        with _encoding((text,) if pair is None else (text, pair)):
            if max_length is not None:
                tokenizer.enable_truncation(max_length, direction=self._truncation_side)
            try:
                coded = tokenizer.encode(text, pair or None)
            finally:
                tokenizer.no_truncation()
        return Encoded(list(coded.ids), list(coded.type_ids), list(coded.offsets))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        text = str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
        for space, none in _CLEANED if self._clean else ():
            text = text.replace(space, none)
        return text

    def encode_chat(
        self,
        prompt: str | Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer.

        Args:
            prompt: the user's message, or messages with ``role`` and ``content``.
            tools: JSON schemas of tools.
            documents: documents to answer from.

        Raises:
            DataError: the tokenizer has no chat template, or the template refuses the messages.
        """
        text = self.chat_text(prompt, tools=tools, documents=documents)
        return self.encode(text, special_tokens=False)

    def chat_text(
        self,
        prompt: str | Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """What :meth:`encode_chat` encodes, as text; raises as it does."""
        return self._chat.render(
            prompt, tools=tools, documents=documents, add_generation_prompt=add_generation_prompt
        )

    @cached_property
    def _chat(self) -> ChatTemplates:
        from lora_edge.runtime.text.chat import ChatTemplates

        return ChatTemplates(
            self.templates, self.special_tokens, f"the tokenizer of {self._folders[0]}"
        )

    def _file(self, name: str) -> Path | None:
        return next((x / name for x in self._folders if (x / name).is_file()), None)

    def _check(self) -> None:
        """Encode once: a damaged post-processor shows only then."""
        what = f"the tokenizer of {self._folders[0]} cannot encode"
        with _panics(BundleError, what, _AGAIN), _silent_stderr():
            self._tokenizer.encode("Hi, é 1")
            self._tokenizer.encode("a", "b")
            self._tokenizer.decode([0])


_CLEANED = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
    (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    return read_object(path, BundleError, _AGAIN, nonfinite=True)


def _text(token: object) -> str | None:
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


@contextlib.contextmanager
def _encoding(texts: Sequence[object]) -> Iterator[None]:
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"a text is {type(text).__name__}, expected str", "Pass a str.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"the text holds {text[error.start]!r}, half of a surrogate pair, at {error.start}",
                "Read the text as UTF-8, or replace what is no character of Unicode.",
            ) from error
    with _panics(DataError, "the text cannot be encoded", "Shorten it, or check max_length."):
        yield


@contextlib.contextmanager
def _panics(kind: type[BundleError | DataError], what: str, hint: str) -> Iterator[None]:
    """tokenizers raises plain Exception; where its Rust code gives up, a BaseException."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise kind(f"{what}: {reason}", hint) from error


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Rust prints the trace of a panic to the process's stderr, before Python sees it."""
    try:
        kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # there is none
        yield
        return
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
