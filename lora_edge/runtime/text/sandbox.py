"""A template that somebody else wrote, rendered within limits of time, memory and output.

Chat templates come with checkpoints, so they are untrusted programs. jinja2's sandbox keeps them
from reaching outside; nothing in it keeps them from running for ever or filling the memory. Here
they cannot, in the process itself: the template's syntax tree is rewritten so that every round of a
loop, every macro and every slice is counted, and every operator, filter, test and method is asked
for the size of its result before it runs. A subprocess that can be killed would be simpler, but it
costs a tenth of a second a prompt, is no option on phones and in browsers, and does not bound
memory on every system.

Knows jinja2; knows nothing of chats, tokenizers or files.
"""

from __future__ import annotations

import functools
import itertools
import re
import string
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jinja2
import jinja2.ext
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

SECONDS = 2.0
"""Processor time that a template may take."""
UNITS = 32_000_000
"""What a template may make: characters and, at 100 each, items; more where its input is large."""
STEPS = 500_000
"""Rounds of loops, calls, and values looked at."""
SOURCE = 1_000_000
"""Characters of a template."""
_ITEM, _DEPTH, _SIZE, _BITS = 100, 200, 1_000_000, 8_192

_clock = getattr(time, "thread_time", time.process_time)
_meter: ContextVar[Meter | None] = ContextVar("meter", default=None)


class TemplateLimitError(Exception):
    """A template that takes more time or makes more text than it may."""


class Meter:
    """What one rendering has used.

    Args:
        units: what it may make.
    """

    def __init__(self, units: int = UNITS) -> None:
        self._units = units
        self._steps = STEPS
        self._end = _clock() + SECONDS

    def step(self, count: int = 1) -> None:
        """Count rounds, calls or values.

        Raises:
            TemplateLimitError: there were too many, or the time is over.
        """
        self._steps -= count
        if self._steps < 0:
            raise TemplateLimitError(f"it takes more than {STEPS:,} steps")
        if _clock() > self._end:
            raise TemplateLimitError(f"it takes more than {SECONDS:g} seconds")

    def room(self, units: int) -> None:
        """Raise unless so many units may still be made."""
        self.step()
        if units > self._units:
            raise TemplateLimitError("it makes too much text, or too long a list")

    def spend(self, units: int) -> None:
        """Count units that were made."""
        self.room(units)
        self._units -= units

    def size(self, value: Any) -> int:
        """Units of a value with everything in it, as often as it is in it; :meth:`room` for it."""
        if isinstance(value, str | bytes):
            self.room(len(value))
            return len(value) + _ITEM
        total, stack = 0, [iter((value,))]
        while stack:
            for inner in stack[-1]:
                total += _ITEM + (len(inner) if isinstance(inner, str | bytes) else 0)
                if total > self._units:
                    self.room(total)
                below = _inside(inner)
                if below is not None:
                    if len(stack) > _DEPTH:
                        raise TemplateLimitError(f"a value is nested more than {_DEPTH} deep")
                    stack.append(below)
                    break
            else:
                stack.pop()
        self.step(total // _ITEM)
        return total

    def made(self, value: Any) -> Any:
        """Count a result, and give it back."""
        if isinstance(value, str | bytes):
            self.spend(len(value))
        elif isinstance(value, list | tuple | dict):
            self.spend(_ITEM * len(value))
        elif isinstance(value, int) and value.bit_length() > _BITS:
            raise TemplateLimitError("it makes too large a number")
        return value


def _inside(value: Any) -> Iterator[Any] | None:
    if isinstance(value, Mapping):
        return itertools.chain.from_iterable(value.items())
    if isinstance(value, _COLLECTIONS):
        items: Iterator[Any] = iter(value)
        return items
    if isinstance(value, jinja2.utils.Namespace):
        return itertools.chain.from_iterable(value._Namespace__attrs.items())
    return None


_VIEWS: tuple[type, ...] = type({}.keys()), type({}.values()), type({}.items())
_SEQUENCE = str, bytes, list, tuple
_COLLECTIONS: tuple[type[Any], ...] = list, tuple, set, frozenset, *_VIEWS


@contextmanager
def metered(meter: Meter) -> Iterator[Meter]:
    """Count what the templates do that are compiled and rendered in the block."""
    token = _meter.set(meter)
    try:
        yield meter
    finally:
        _meter.reset(token)


def _now() -> Meter:
    meter = _meter.get()
    # Outside of a rendering nothing is owed, but nothing is free either.
    return Meter() if meter is None else meter


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with every operation counted; use it within :func:`metered`."""

    intercepted_binops = frozenset(jinja2.sandbox.SandboxedEnvironment.default_binop_table)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, finalize=_printed, optimized=False)
        self.globals["lipsum"] = _no_lipsum
        self.tests = {name: _guarded(name, test) for name, test in self.tests.items()}
        self.filters: dict[str, Any] = {
            name: _guarded(name, made) for name, made in self.filters.items()
        }
        # No template can name these.
        self.filters |= {"@step": _step, "@sized": _sized, "@made": _made, "@concat": _concat}

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Register a filter, counted as the others are."""
        self.filters[name] = _guarded(name, function)

    def template(self, source: str) -> jinja2.Template:
        """Compile a template.

        Raises:
            TemplateLimitError: it is too long.
            Exception: whatever jinja2 or Python raise on what is no template.
        """
        if len(source) > SOURCE:
            raise TemplateLimitError(f"it has more than {SOURCE:,} characters")
        tree = _Counting().visit(self.parse(source))
        tree.set_environment(self)
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):  # its hash is of everything in it
            _now().size(argument)
        return super().getitem(obj, argument)

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        meter = _now()
        meter.step()
        if operator == "*":
            for one, times in ((left, right), (right, left)):
                if isinstance(one, _SEQUENCE) and isinstance(times, int):
                    unit = 1 if isinstance(one, str | bytes) else _ITEM
                    meter.room(len(one) * unit * max(times, 0))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * max(right, 0) > _BITS:
                raise TemplateLimitError("it makes too large a number")
        elif operator == "%" and isinstance(left, str | bytes):
            _check_percent(meter, left, right)
        elif operator == "+" and isinstance(left, _SEQUENCE) and isinstance(right, _SEQUENCE):
            meter.room(len(left) + len(right))
        return meter.made(super().call_binop(context, operator, left, right))

    def call(  # by position only: the names may be those of a template's arguments
        self, context: jinja2.runtime.Context, obj: Any, /, *args: Any, **kwargs: Any
    ) -> Any:
        meter = _now()
        meter.step()
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes | list | tuple | dict | int | float):
            args = tuple(map(_listed, args))
            _check_method(meter, owner, str(method.__name__), args, kwargs)
        elif not isinstance(obj, _OWN):
            for value in (*args, *kwargs.values()):
                meter.size(value)
        return meter.made(super().call(context, obj, *args, **kwargs))


_OWN = jinja2.runtime.Macro, jinja2.runtime.LoopContext, jinja2.runtime.BlockReference


class _Counting(NodeTransformer):
    """Rewrites a template's tree: loops, macros and blocks count their rounds and their text."""

    def visit_Template(self, node: nodes.Template) -> nodes.Node:  # noqa: N802
        return self._counted(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        return self._counted(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802
        return self._counted(node)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:  # noqa: N802
        return self._counted(node)

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self._counted(node)
        if node.test is not None:
            node.test = nodes.And(_apply(nodes.Const(0), "@step"), node.test, lineno=node.lineno)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _apply(node.expr, "@sized")
        for operand in node.ops:
            operand.expr = _apply(operand.expr, "@sized")
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.key = _apply(node.key, "@sized")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _apply(node.nodes[0], "@concat", *node.nodes[1:])

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _apply(node, "@made") if isinstance(node.arg, nodes.Slice) else node

    def _counted(self, node: Any) -> nodes.Node:
        length = sum(map(_text_length, node.body))
        self.generic_visit(node)
        count = _apply(nodes.Const(length), "@step")
        node.body.insert(0, nodes.ExprStmt(count, lineno=node.lineno))
        return node  # type: ignore[no-any-return]


def _apply(node: nodes.Expr, name: str, *more: nodes.Expr) -> nodes.Expr:
    return nodes.Filter(node, name, list(more), [], None, None, lineno=node.lineno or 1)


def _text_length(node: nodes.Node) -> int:
    """Characters that a statement prints as they are, those of loops' and macros' bodies apart."""
    if isinstance(node, nodes.TemplateData):
        return len(node.data)
    if isinstance(node, nodes.Macro | nodes.CallBlock | nodes.Block):
        return 0
    inside = node.else_ if isinstance(node, nodes.For) else node.iter_child_nodes()
    return sum(map(_text_length, inside))


@jinja2.pass_context  # so that it is never computed when the template is compiled
def _step(_: jinja2.runtime.Context, units: int) -> bool:
    _now().spend(units)
    return True


def _sized(value: Any) -> Any:
    if not isinstance(value, int | float | None):
        _now().size(value)
    return value


def _made(value: Any) -> Any:
    return _now().made(value)


@jinja2.pass_eval_context
def _concat(context: nodes.EvalContext, *parts: Any) -> str:
    meter = _now()
    meter.room(sum(map(meter.size, parts)))
    join = jinja2.runtime.markup_join if context.autoescape else jinja2.runtime.str_join
    return str(meter.made(join(parts)))


def _printed(value: Any) -> Any:
    meter = _now()
    meter.spend(meter.size(value))
    return value


def _no_lipsum(*_: Any, **__: Any) -> str:
    raise jinja2.exceptions.SecurityError("lipsum is random text; no prompt is made of it")


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


def _guarded(name: str, function: Any) -> Callable[..., Any]:
    """A filter or a test that is counted."""
    passed = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        meter = _now()
        meter.step()
        values = list(args[passed:])
        if name in _GREEDY and values:
            values[0] = _listed(values[0])
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


def _listed(items: Any) -> Any:
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
    meter.room(2 * total + total // _ITEM * (wide * _depth(value) + parts))


def _depth(value: Any) -> int:
    deepest, stack = 1, [iter((value,))]
    while stack:
        for inner in stack[-1]:
            below = _inside(inner)
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


def _check_method(
    meter: Meter, owner: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Ask for the room that a method of a built-in type needs, before it is called."""
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
