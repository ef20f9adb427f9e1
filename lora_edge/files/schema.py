"""Data from a file -> what it has to be, by type annotations; anything else is refused by name.

A schema is a frozen dataclass (every field that a file may have, no other), or a ``TypedDict`` for
files of other programs (the fields that we read; others pass as they are). Values are held by
``Annotated`` with a :class:`Rule`. Knows nothing of what any file means.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from lora_edge.errors import LoraEdgeError

T = TypeVar("T")
_Decoder = Callable[[Any, str], Any]


class Rule(NamedTuple):
    """What a value has to be besides its type.

    Attributes:
        expected: in words, as in "expected 1 to 64".
        holds: whether a value is so.
    """

    expected: str
    holds: Callable[[Any], bool]


def between(low: float, high: float) -> Rule:
    """A number from ``low`` to ``high``."""
    return Rule(f"{low} to {high}", lambda value: low <= value <= high)


def sized(least: int, most: int) -> Rule:
    """A text, list or object of so many characters or entries."""
    return Rule(f"{least} to {most} of them", lambda value: least <= len(value) <= most)


FINITE = Rule("a finite number", math.isfinite)


def _is_inside(path: str) -> bool:
    parts = path.split("/")
    return (
        not PurePosixPath(path).is_absolute()
        and "\\" not in path
        and ":" not in path
        and all(part not in ("", ".", "..") and len(part.encode()) < 256 for part in parts)
        and len(path) < 1024
        and path.isprintable()
    )


INSIDE = Rule("a relative path without '..'", _is_inside)
"""A path with ``/`` that leads nowhere but into its own folder, on every system."""

RelativePath = Annotated[str, INSIDE]
Sha256 = Annotated[
    str, Rule("64 hexadecimal digits", lambda x: len(x) == 64 and set(x) <= set("0123456789abcdef"))
]


class _UnfitError(ValueError):
    """The data is not what the schema says."""


def decode(
    kind: type[T],
    data: Any,
    what: str,
    error: type[LoraEdgeError],
    hint: str,
    **instead: Any,
) -> T:
    """What data from a file means.

    Args:
        kind: dataclass, ``TypedDict`` or other type; ``bool``, ``int``, ``float``, ``str``,
            ``Literal``, ``Mapping``, ``tuple``, ``list``, ``|`` and ``Annotated`` may occur in it.
            A whole number is a float too, a bool is no number, a list becomes a tuple.
        data: as a JSON reader gives it.
        what: what the data is called in an error.
        error: what is raised where it does not fit.
        hint: of that error: what to do.
        instead: field of ``kind`` -> the type to use instead of its own.

    Raises:
        LoraEdgeError: of type ``error``: the first field that does not fit, what it is, and what
            was expected.
    """
    try:
        if instead:
            decoded = _record(kind, {**get_type_hints(kind, include_extras=True), **instead})
        else:
            decoded = _decoder(cast(Any, kind))
        return cast(T, decoded(data, ""))
    except _UnfitError as unfit:
        raise error(f"{what}: {unfit}", hint) from None


@functools.lru_cache(maxsize=1024)
def _decoder(kind: Any) -> _Decoder:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value, _: value
    if origin is Annotated:
        return _ruled(_decoder(arguments[0]), arguments[1:])
    if origin is Literal:
        return _literal(arguments)
    if origin in (Union, types.UnionType):
        return _union(arguments)
    if dataclasses.is_dataclass(kind) or is_typeddict(kind):
        return _record(kind, get_type_hints(kind, include_extras=True))
    if origin is tuple and arguments[-1] is not Ellipsis:
        return _fixed(arguments)
    if origin in (tuple, list, Sequence):
        return _sequence(_decoder(arguments[0]), list if origin is list else tuple)
    if origin in (dict, Mapping):
        return _mapping(*map(_decoder, arguments))
    if kind in _PLAIN:
        return _PLAIN[kind]
    raise TypeError(f"no decoder for {kind!r}")


def _unfit(where: str, value: Any, expected: str) -> _UnfitError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return _UnfitError(f"{where or 'it'} is {shown}, expected {expected}")


def _inside(where: str, key: str) -> str:
    key = key if len(key) <= 80 else f"{key[:77]}..."
    return f"{where}.{key}" if where else key


def _is(test: Callable[[Any], bool], expected: str) -> _Decoder:
    def decoded(value: Any, where: str) -> Any:
        if not test(value):
            raise _unfit(where, value, expected)
        return value

    return decoded


def _float(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _unfit(where, value, "a number")
    try:
        return float(value)
    except OverflowError:
        raise _unfit(where, value, "a number") from None


_PLAIN: Mapping[Any, _Decoder] = {
    None: _is(lambda x: x is None, "null"),
    type(None): _is(lambda x: x is None, "null"),
    bool: _is(lambda x: isinstance(x, bool), "true or false"),
    int: _is(lambda x: isinstance(x, int) and not isinstance(x, bool), "a whole number"),
    float: _float,
    str: _is(lambda x: isinstance(x, str), "a text"),
    list: _is(lambda x: isinstance(x, list), "a list"),
    dict: _is(lambda x: isinstance(x, dict), "an object"),
}


def _ruled(inner: _Decoder, rules: Sequence[Any]) -> _Decoder:
    def decoded(value: Any, where: str) -> Any:
        found = inner(value, where)
        for rule in rules:
            if isinstance(rule, Rule) and not rule.holds(found):
                raise _unfit(where, value, rule.expected)
        return found

    return decoded


def _literal(choices: Sequence[Any]) -> _Decoder:
    expected = " or ".join(map(repr, choices))

    def decoded(value: Any, where: str) -> Any:
        # 1 == True, and a list is not hashable.
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise _unfit(where, value, expected)
        return value

    return decoded


def _union(kinds: Sequence[Any]) -> _Decoder:
    decoders = [_decoder(kind) for kind in kinds if kind is not type(None)]
    optional = len(decoders) < len(kinds)

    def decoded(value: Any, where: str) -> Any:
        if value is None and optional:
            return None
        faults = []
        for one in decoders:
            try:
                return one(value, where)
            except _UnfitError as unfit:
                faults.append(unfit)
        # The alternative that went deepest is the one that was meant.
        raise max(faults, key=lambda fault: str(fault).partition(" is ")[0].count("."))

    return decoded


def _fixed(kinds: Sequence[Any]) -> _Decoder:
    decoders = [_decoder(kind) for kind in kinds]

    def decoded(value: Any, where: str) -> Any:
        if not isinstance(value, list) or len(value) != len(decoders):
            raise _unfit(where, value, f"a list of {len(decoders)}")
        pairs = enumerate(zip(decoders, value, strict=True))
        return tuple(one(item, f"{where}[{index}]") for index, (one, item) in pairs)

    return decoded


def _sequence(inner: _Decoder, made: Callable[[Any], Any]) -> _Decoder:
    def decoded(value: Any, where: str) -> Any:
        if not isinstance(value, list):
            raise _unfit(where, value, "a list")
        return made([inner(item, f"{where}[{index}]") for index, item in enumerate(value)])

    return decoded


def _mapping(key: _Decoder, inner: _Decoder) -> _Decoder:
    def decoded(value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise _unfit(where, value, "an object")
        return {
            key(name, f"a key of {where or 'it'}"): inner(item, _inside(where, name))
            for name, item in value.items()
        }

    return decoded


def _record(kind: Any, hints: Mapping[str, Any]) -> _Decoder:
    decoders = {name: _decoder(hint) for name, hint in hints.items()}
    typed = is_typeddict(kind)
    if typed:
        needed = set(kind.__required_keys__)
    else:
        needed = {
            field.name
            for field in dataclasses.fields(kind)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
        decoders = {field.name: decoders[field.name] for field in dataclasses.fields(kind)}

    def decoded(value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise _unfit(where, value, "an object")
        missing = sorted(needed - value.keys())
        if missing:
            raise _UnfitError(f"{_inside(where, missing[0])} is missing")
        if not typed and value.keys() - decoders.keys():
            odd = min(value.keys() - decoders.keys())
            raise _UnfitError(f"{_inside(where, odd)} is no field that is known")
        found = {
            name: decoders[name](item, _inside(where, name)) if name in decoders else item
            for name, item in value.items()
        }
        return found if typed else kind(**found)

    return decoded
