"""Conversations -> text by a model's own chat templates, as transformers' ``apply_chat_template``.

What a template may use is what transformers 5 gives it (``utils/chat_template_utils.py``): the same
variables, defined or not, the same filters, tags and functions, the same plain data. How long and
how large it may run is :mod:`lora_edge.runtime.text.sandbox`'s affair.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.utils
import numpy as np

from lora_edge.errors import DataError
from lora_edge.runtime.text.meter import UNITS, Meter, TemplateLimitError, metered
from lora_edge.runtime.text.sandbox import Sandbox
from lora_edge.runtime.text.text import Message

_REASONING = ("reasoning_content", "thinking", "reasoning")
_DEFAULT, _TOOLS = "default", "tool_use"
_LONGEST_REASON = 300


class ChatTemplates:
    """The chat templates of a model.

    Args:
        sources: name -> template; one that is alone is called ``default``.
        tokens: names and texts of the special tokens, which templates see as variables.
        where: what the templates are of, for messages.
    """

    def __init__(self, sources: Mapping[str, str], tokens: Mapping[str, str], where: str) -> None:
        self.sources = dict(sources)
        self._tokens = dict(tokens)
        self._where = where

    def render(
        self,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: the user's message, or messages with ``role`` and ``content``.
            tools: JSON schemas of tools that the model may call.
            documents: documents that the model may answer from.
            add_generation_prompt: end with the opening of the assistant's answer.

        Raises:
            DataError: there is no template, a message is none, or the template refuses them, fails,
                or goes beyond its limits.
        """
        source = self._chosen(tools is not None)
        given = {"messages": _messages(messages), "tools": tools, "documents": documents}
        for name, values in (("tools", tools), ("documents", documents)):
            for one in values or ():
                if not isinstance(one, Mapping):
                    raise DataError(
                        f"{name} hold {type(one).__name__}, expected mappings",
                        "Give a tool as its JSON schema, a document as {'title', 'text'}.",
                    )
        with _explained(self._where):
            data = {name: _plain(value) for name, value in given.items()}
            data["messages"] = [_aliased(message) for message in data["messages"]]
            template = _compiled(source)
            meter = Meter(max(UNITS, 8 * Meter(_LARGEST).size(list(data.values()))))
            with metered(meter):
                return template.render(
                    **{**data, "add_generation_prompt": add_generation_prompt, **self._tokens}
                )

    def _chosen(self, with_tools: bool) -> str:
        if with_tools and _TOOLS in self.sources:
            return self.sources[_TOOLS]
        if _DEFAULT in self.sources:
            return self.sources[_DEFAULT]
        if self.sources:
            raise DataError(
                f"{self._where} has several chat templates and no default: "
                f"{', '.join(sorted(self.sources))}",
                "Name one of them default, or write the whole prompt yourself.",
            )
        raise DataError(
            f"{self._where} has no chat template",
            "Leave chat out and write the whole prompt yourself.",
        )


_LARGEST = 1_000_000_000


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turns whatever a template raises into a refusal."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        if isinstance(error, TemplateLimitError):
            said = f"the chat template of {where} was stopped: {reason}"
            hint = "Use a checkpoint whose template is sound, or shorten the conversation."
        elif isinstance(error, jinja2.TemplateSyntaxError):
            said = f"the chat template of {where} cannot be read: {reason}"
            hint = "Export a base whose chat template works, or leave chat out."
        elif isinstance(error, jinja2.TemplateError):
            said = f"the chat template refuses the messages: {reason}"
            hint = "Check the roles and their order."
        else:
            said = f"the chat template fails on the messages: {type(error).__name__}: {reason}"
            hint = "Check what the messages hold; the template is the checkpoint's own."
        raise DataError(said, hint) from error


def _messages(messages: str | Sequence[Message]) -> list[Message]:
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence) or not messages:
        raise DataError(
            f"a conversation is {messages!r}, expected a text or a list of messages",
            "Write [{'role': 'user', 'content': '...'}].",
        )
    made: list[Message] = []
    for message in messages:
        # An answer that calls tools need have no content.
        if not isinstance(message, Mapping) or "role" not in message or len(message) < 2:
            raise DataError(
                f"a message is {message!r}, expected a mapping with role and content",
                "Write {'role': 'user', 'content': '...'}.",
            )
        made.append({key: value for key, value in message.items() if value is not None})
    return made


def _aliased(message: dict[Any, Any]) -> dict[Any, Any]:
    found = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    if found is None:
        return message
    return {"thinking": found, **message, "reasoning_content": found}


def _plain(value: Any) -> Any:
    """The value out of JSON's types; anything else becomes a word that names its type."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # an enum's member, a numpy scalar
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (
            type(value)(map(_plain, value))
            if type(value) in (list, tuple)
            else [*map(_plain, value)]
        )
    if isinstance(value, np.generic):
        return _plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: _plain(getattr(value, field.name)) for field in fields}
    if callable(getattr(value, "model_dump", None)):
        return _plain(value.model_dump())
    return f"<{type(value).__name__}>"


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    with metered(Meter()):
        return _environment().template(source)


@functools.cache
def _environment() -> Sandbox:
    made = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    made.add_filter("tojson", _to_json)
    made.globals |= {
        "raise_exception": _refuse,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return made


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training. It opens a scope."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance attribute

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_words")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _words(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may name one self
        self, args = args[0], args[1:]
        names = dict(*args, **kwargs)
        for name in names:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name like {name!r}")


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unlike jinja2's own filter: no HTML escapes, non-ASCII as it is.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:
    if len(format) > _LONGEST_REASON:
        raise TemplateLimitError("the format of a time is too long")
    return datetime.now().strftime(format)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
