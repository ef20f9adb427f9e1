"""Text <-> token ids with the bundle's own ``tokenizer.json`` and chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from lora_edge.errors import BundleError, DataError
from lora_edge.files.json import read_object, read_text

Message = Mapping[str, Any]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)


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
            ``tokenizer_config.json`` and ``chat_template.jinja``.

    Raises:
        BundleError: there is no tokenizer, or it cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise BundleError(
                f"{directory} has no tokenizer.json",
                "Use token ids (logits, generate_ids), or export a base that has one.",
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise BundleError(f"{path} cannot be read: {error}", "Copy it again.") from error
        # Both may be saved in the file; they are the training's affair.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._config = _read_json(directory / "tokenizer_config.json")
        self._template: jinja2.Template | None = None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the added ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids; ``special_tokens`` adds what the tokenizer itself puts around a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=special_tokens).ids)

    def encode_input(
        self, text: str, pair: str | None = None, *, max_length: int | None = None
    ) -> Encoded:
        """What an encoder reads of a text, or of two.

        Args:
            text: the text.
            pair: a second text, which the tokenizer puts behind it.
            max_length: cut the texts (the longer one first) to this many tokens, special ones
                included; ``None``: never.
        """
        if max_length is not None:
            self._tokenizer.enable_truncation(max_length)
        try:
            coded = self._tokenizer.encode(text, pair)
        finally:
            self._tokenizer.no_truncation()
        return Encoded(list(coded.ids), list(coded.type_ids), list(coded.offsets))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def encode_chat(self, prompt: str | Sequence[Message]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer.

        Args:
            prompt: the user's message, or messages with ``role`` and ``content``.

        Raises:
            DataError: the tokenizer has no chat template, or the template refuses the messages.
        """
        return self.encode(self.chat_text(prompt), special_tokens=False)

    def chat_text(self, prompt: str | Sequence[Message]) -> str:
        """What :meth:`encode_chat` encodes, as text; raises as it does."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        for message in messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise DataError(
                    f"a message is {message!r}, expected a mapping with role and content",
                    "Write {'role': 'user', 'content': '...'}.",
                )
        if self._template is None:
            self._template = self._compile()
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=True, **self._special_tokens()
            )
        except jinja2.TemplateError as error:
            raise DataError(
                f"the chat template refuses the messages: {error}",
                "Check the roles and their order.",
            ) from error

    def _special_tokens(self) -> dict[str, str]:
        tokens = {**_read_json(self.directory / "special_tokens_map.json"), **self._config}
        texts = {key: _text(value) for key, value in tokens.items() if key.endswith("_token")}
        return {key: text for key, text in texts.items() if text is not None}

    def _compile(self) -> jinja2.Template:
        source = self._template_source()
        # The options and helpers that transformers' apply_chat_template gives to a template.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = datetime.now().astimezone().strftime
        try:
            return environment.from_string(source)
        except jinja2.TemplateError as error:
            raise DataError(
                f"the chat template of {self.directory} cannot be read: {error}",
                "Export a base whose chat template works, or leave chat out.",
            ) from error

    def _template_source(self) -> str:
        path = self.directory / "chat_template.jinja"
        if path.is_file():
            return read_text(path, BundleError, "Copy it again.", max_bytes=1 << 20)
        source = self._config.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if not isinstance(source, str):
            raise DataError(
                f"the tokenizer of {self.directory} has no chat template",
                "Leave chat out and write the whole prompt yourself.",
            )
        return source


def eos_ids(directory: Path) -> frozenset[int]:
    """The tokens that end a completion: ``generation_config.json``'s, else ``config.json``'s."""
    for name in ("generation_config.json", "config.json"):
        found = _read_json(directory / name).get("eos_token_id")
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return read_object(path, BundleError, "Copy it again.", nonfinite=True)


def _text(token: object) -> str | None:
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _to_json(value: object, indent: int | None = None) -> str:
    # Unlike jinja2's own filter: no HTML escapes, non-ASCII as it is.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
