"""Does data fit a JSON Schema of ours? The keywords that our schemas use, and no others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Schema = Mapping[str, Any]

_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "null": lambda x: x is None,
    "boolean": lambda x: isinstance(x, bool),
    "integer": lambda x: isinstance(x, int) and not isinstance(x, bool),
    "number": lambda x: isinstance(x, int | float) and not isinstance(x, bool),
    "string": lambda x: isinstance(x, str),
    "array": lambda x: isinstance(x, list),
    "object": lambda x: isinstance(x, dict),
}
_SAYS_NOTHING = {"$schema", "title", "description", "examples"}


def unfit(data: Any, schema: Schema, where: str = "it") -> str:
    """The first thing in ``data`` that a schema does not allow, in words; empty: it fits.

    ``oneOf`` is taken as "one or more of".

    Raises:
        TypeError: the schema has a keyword that is not known here.
    """
    for keyword, wanted in schema.items():
        if keyword not in _SAYS_NOTHING:
            if keyword not in _CHECKS:
                raise TypeError(f"the keyword {keyword!r} is not known")
            fault = _CHECKS[keyword](data, wanted, where, schema)
            if fault:
                return fault
    return ""


def _unlike(where: str, data: Any, expected: str) -> str:
    shown = repr(data)
    return f"{where} is {shown if len(shown) <= 80 else f'{shown[:77]}...'}, expected {expected}"


def _type(data: Any, wanted: Any, where: str, _: Schema) -> str:
    names = [wanted] if isinstance(wanted, str) else wanted
    fits = any(_TYPES[name](data) for name in names)
    return "" if fits else _unlike(where, data, " or ".join(names))


def _enum(data: Any, wanted: Any, where: str, _: Schema) -> str:
    fits = any(type(data) is type(each) and data == each for each in wanted)
    return "" if fits else _unlike(where, data, " or ".join(map(repr, wanted)))


def _const(data: Any, wanted: Any, where: str, schema: Schema) -> str:
    return _enum(data, [wanted], where, schema)


def _minimum(data: Any, wanted: Any, where: str, _: Schema) -> str:
    fits = not _TYPES["number"](data) or data >= wanted
    return "" if fits else _unlike(where, data, f"{wanted} or more")


def _maximum(data: Any, wanted: Any, where: str, _: Schema) -> str:
    fits = not _TYPES["number"](data) or data <= wanted
    return "" if fits else _unlike(where, data, f"{wanted} or less")


def _required(data: Any, wanted: Any, where: str, _: Schema) -> str:
    missing = [name for name in wanted if isinstance(data, dict) and name not in data]
    return f"{where} lacks {missing[0]!r}" if missing else ""


def _properties(data: Any, wanted: Any, where: str, _: Schema) -> str:
    if isinstance(data, dict):
        for name in wanted.keys() & data.keys():
            fault = unfit(data[name], wanted[name], name if where == "it" else f"{where}.{name}")
            if fault:
                return fault
    return ""


def _others(data: Any, wanted: Any, where: str, schema: Schema) -> str:
    if isinstance(data, dict):
        for name in data.keys() - schema.get("properties", {}).keys():
            if wanted is False:
                return f"{where} has the unknown {name[:80]!r}"
            fault = "" if wanted is True else unfit(data[name], wanted, f"{where}.{name[:80]}")
            if fault:
                return fault
    return ""


def _items(data: Any, wanted: Any, where: str, _: Schema) -> str:
    if isinstance(data, list):
        for index, item in enumerate(data):
            fault = unfit(item, wanted, f"{where}[{index}]")
            if fault:
                return fault
    return ""


def _one_of(data: Any, wanted: Any, where: str, _: Schema) -> str:
    faults = [unfit(data, each, where) for each in wanted]
    # The last alternative is the one with something in it.
    return "" if "" in faults else faults[-1]


_CHECKS: Mapping[str, Callable[[Any, Any, str, Schema], str]] = {
    "type": _type,
    "enum": _enum,
    "const": _const,
    "minimum": _minimum,
    "maximum": _maximum,
    "required": _required,
    "properties": _properties,
    "additionalProperties": _others,
    "items": _items,
    "oneOf": _one_of,
    "anyOf": _one_of,
}
