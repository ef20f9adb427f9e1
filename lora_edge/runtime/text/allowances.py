"""How much an operator, a filter, a test or a method would make: asked before it runs.

Knows those of jinja2 and of Python's own types; each is refused that has no room, see
:mod:`lora_edge.runtime.text.meter`.
"""

from __future__ import annotations

import functools
import itertools
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lora_edge.runtime.text.meter import (
    BITS,
    ITEM,
    STEPS,
    UNITS,
    Meter,
    TemplateLimitError,
    inside,
    now,
)

_SIZE = 1_000_000  # of a number that says how long something becomes
# Filters and tests that look at no more than the outside of their arguments.
_SHALLOW = frozenset({
    "attr", "boolean", "callable", "count", "d", "default", "defined", "even", "false", "filter",
    "first", "float", "integer", "items", "iterable", "last", "length", "list", "map", "mapping",
    "none", "number", "odd", "random", "reject", "rejectattr", "reverse", "sameas", "select",
    "selectattr", "sequence", "true", "undefined",
})  # fmt: skip
_GREEDY = frozenset({
    "groupby", "join", "last", "list", "max", "min", "reverse", "slice", "sort", "sum",
})  # fmt: skip
_SIZES = frozenset({
    "batch", "center", "indent", "round", "slice", "tojson", "truncate", "urlize", "wordwrap",
})  # fmt: skip
_SMALL = frozenset({"pprint", "striptags", "urlize", "wordwrap", "xmlattr"})


def guarded(name: str, function: Any) -> Callable[..., Any]:
    """A filter or a test that is counted."""
    passed = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        meter = now()
        meter.step()
        values = list(args[passed:])
        if name in _GREEDY and values:
            values[0] = listed(values[0])
        total = 0
        if name not in _SHALLOW:
            total = sum(map(meter.size, (*values, *kwargs.values())))
        if name in _SIZES:
            for value in (*values[1:], *kwargs.values()):
                if isinstance(value, int) and abs(value) > _SIZE:
                    raise TemplateLimitError(f"the number {value} is too large for {name}")
        if name in _SMALL and total > UNITS // 64:
            raise TemplateLimitError(f"the text is too long for {name}")
        check = _FILTERS.get(name)
        if check is not None:
            check(meter, *values, **kwargs)
        return meter.made(function(*args[:passed], *values, **kwargs))

    return run


def listed(items: Any) -> Any:
    """An iterator's items, so that they can be measured before they are used; else as it is."""
    return list(itertools.islice(items, STEPS)) if isinstance(items, Iterator) else items


def _check_join(meter: Meter, items: Any, d: str = "", *_: Any, **__: Any) -> None:
    if isinstance(items, str | list | tuple | dict):
        meter.room(meter.size(items) + len(str(d)) * len(items))


def _check_sum(meter: Meter, items: Any, attribute: Any = None, start: Any = 0) -> None:
    del attribute
    if isinstance(start, list | tuple | str):  # each addition copies all that came before
        meter.room(len(items) * meter.size(items) + len(items) * meter.size(start))


def _check_json(
    meter: Meter,
    value: Any,
    ensure_ascii: Any = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: Any = False,
) -> None:
    del ensure_ascii, sort_keys
    total = meter.size(value)
    wide = abs(indent) if isinstance(indent, int) else len(indent or "")
    parts = 0 if separators is None else meter.size(separators)
    meter.room(2 * total + total // ITEM * (wide * _depth(value) + parts))


def _depth(value: Any) -> int:
    deepest, stack = 1, [iter((value,))]
    while stack:
        for inner in stack[-1]:
            below = inside(inner)
            if below is not None:
                stack.append(below)
                deepest = max(deepest, len(stack))
                break
        else:
            stack.pop()
    return deepest


def _check_indent(meter: Meter, text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    wide = width if isinstance(width, int) else len(str(width))
    meter.room((str(text).count("\n") + 2) * abs(wide))


def _check_replace(meter: Meter, text: Any, old: Any, new: Any, count: Any = None) -> None:
    text, old, new = (x if isinstance(x, bytes) else str(x) for x in (text, old, new))
    found = text.count(old) if old else len(text) + 1
    if isinstance(count, int) and count >= 0:
        found = min(found, count)
    meter.room(len(text) + found * len(new))


def _check_trim(meter: Meter, text: Any, chars: Any = None) -> None:
    if isinstance(chars, str | bytes):
        meter.room(len(text) * len(chars) // 8)


def _check_round(_: Meter, *given: Any, **named: Any) -> None:
    precision = given[1] if len(given) > 1 else named.get("precision", 0)
    if isinstance(precision, int) and abs(precision) > 1000:
        raise TemplateLimitError(f"the precision {precision} is too large")


def _check_format_filter(meter: Meter, text: Any, *args: Any, **kwargs: Any) -> None:
    _check_percent(meter, str(text), kwargs or args)


_FILTERS: Mapping[str, Callable[..., None]] = {
    "format": _check_format_filter,
    "indent": _check_indent,
    "join": _check_join,
    "replace": _check_replace,
    "round": _check_round,
    "sum": _check_sum,
    "tojson": _check_json,
    "trim": _check_trim,
}
_SIZED_METHODS = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})
_CODECS = frozenset({"utf8", "utf16", "utf32", "ascii", "latin1", "utf16le", "utf16be"})


def check_method(
    meter: Meter, owner: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Ask for the room that a method of a built-in type needs."""
    given = [*args, *kwargs.values()]
    total = sum(map(meter.size, given))
    if not isinstance(owner, dict) or name not in {"get", "items", "keys", "values", "copy"}:
        total += meter.size(owner)
    if name in _SIZED_METHODS:
        for value in given:
            if isinstance(value, int):
                tabs = owner.count(b"\t" if isinstance(owner, bytes) else "\t")
                meter.room(abs(value) * (tabs if name == "expandtabs" else 1))
    elif name == "join" and args and isinstance(args[0], list | tuple | str | dict):
        meter.room(meter.size(args[0]) + len(owner) * len(args[0]))
    elif name == "replace":
        _check_replace(meter, owner, *args, **kwargs)
    elif name in {"strip", "lstrip", "rstrip"}:
        _check_trim(meter, owner, *args)
    elif name == "translate":
        table = given[0] if given and isinstance(given[0], dict) else {}
        longest = max((len(x) for x in table.values() if isinstance(x, str)), default=1)
        meter.room(len(owner) * longest)
    elif name in {"format", "format_map"}:
        _check_format(meter, str(owner), total)
    elif name in {"encode", "decode"}:
        codec = str(given[0]).lower().replace("-", "").replace("_", "") if given else "utf8"
        if codec not in _CODECS:
            raise TemplateLimitError(f"the encoding {given[0]!r} is not for templates")
    elif name in {"to_bytes", "from_bytes"}:
        raise TemplateLimitError(f"{name} is not for templates")


def _check_format(meter: Meter, text: str, arguments: int) -> None:
    """Of ``str.format``: each field is at most its arguments, or its width."""
    fields = 0
    for _, name, spec, _ in string.Formatter().parse(text):
        if name is None:
            continue
        fields += 1
        if spec and "{" in spec:
            raise TemplateLimitError("the width of a format comes from an argument")
        widths = [_number(digits) for digits in re.findall(r"\d+", spec or "")]
        meter.room(sum(widths) * fields)
    meter.room(fields * arguments)


def _number(digits: str) -> int:
    return int(digits[:20])


def _check_percent(meter: Meter, text: str | bytes, argument: Any) -> None:
    """Of ``text % argument``: each conversion is at most its argument, or its width."""
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    total, fields, at = 0, 0, 0
    while (at := text.find("%", at) + 1) > 0:
        if text[at : at + 1] == "(":
            depth = 0
            while at < len(text):
                depth += {"(": 1, ")": -1}.get(text[at], 0)
                at += 1
                if not depth:
                    break
        found = re.compile(r"[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?[hlL]?(.?)").match(text, at)
        assert found is not None  # each part may be empty
        for digits in found.groups()[:2]:
            if digits == "*":
                raise TemplateLimitError("the width of a format comes from an argument")
            total += _number(digits or "0")
        fields, at = fields + 1, max(found.end(), at)
        meter.room(total)
    meter.room(len(text) + total + fields * meter.size(argument))


_SEQUENCE = str, bytes, list, tuple


def check_operator(meter: Meter, operator: str, left: Any, right: Any) -> None:
    """Ask for the room that an operator needs."""
    if operator == "*":
        for one, times in ((left, right), (right, left)):
            if isinstance(one, _SEQUENCE) and isinstance(times, int):
                unit = 1 if isinstance(one, str | bytes) else ITEM
                meter.room(len(one) * unit * max(times, 0))
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * max(right, 0) > BITS:
            raise TemplateLimitError("it makes too large a number")
    elif operator == "%" and isinstance(left, str | bytes):
        _check_percent(meter, left, right)
    elif operator == "+" and isinstance(left, _SEQUENCE) and isinstance(right, _SEQUENCE):
        meter.room(len(left) + len(right))
