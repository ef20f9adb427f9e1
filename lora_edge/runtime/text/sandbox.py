"""A template that somebody else wrote, rendered within limits of time, memory and output.

Chat templates come with checkpoints, so they are untrusted programs. jinja2's sandbox keeps them
from reaching outside; nothing in it keeps them from running for ever or filling the memory. Here
they cannot, in the process itself: the template's syntax tree is rewritten so that every round of a
loop, every macro and every slice is counted, and every operator, filter, test and method is asked
for the size of its result before it runs. A subprocess that can be killed would be simpler, but it
costs a tenth of a second a prompt, is no option on phones and in browsers, and does not bound
memory on every system.

Knows jinja2; what is used is counted in :mod:`lora_edge.runtime.text.meter`, and what an operation
would use in :mod:`lora_edge.runtime.text.allowances`. Knows nothing of chats, tokenizers or files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.runtime
import jinja2.sandbox
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from lora_edge.runtime.text.allowances import check_method, check_operator, guarded, listed
from lora_edge.runtime.text.meter import TemplateLimitError, now

SOURCE = 1_000_000
"""Characters of a template."""


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with every operation counted; use it within
    :func:`~lora_edge.runtime.text.meter.metered`."""

    intercepted_binops = frozenset(jinja2.sandbox.SandboxedEnvironment.default_binop_table)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, finalize=_printed, optimized=False)
        self.globals["lipsum"] = _no_lipsum
        self.tests = {name: guarded(name, test) for name, test in self.tests.items()}
        self.filters: dict[str, Any] = {
            name: guarded(name, made) for name, made in self.filters.items()
        }
        # No template can name these.
        self.filters |= {"@step": _step, "@sized": _sized, "@made": _made, "@concat": _concat}

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Register a filter, counted as the others are."""
        self.filters[name] = guarded(name, function)

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
            now().size(argument)
        return super().getitem(obj, argument)

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        meter = now()
        meter.step()
        check_operator(meter, operator, left, right)
        return meter.made(super().call_binop(context, operator, left, right))

    def call(  # by position only: the names may be those of a template's arguments
        self, context: jinja2.runtime.Context, obj: Any, /, *args: Any, **kwargs: Any
    ) -> Any:
        meter = now()
        meter.step()
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes | list | tuple | dict | int | float):
            args = tuple(map(listed, args))
            check_method(meter, owner, str(method.__name__), args, kwargs)
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
    now().spend(units)
    return True


def _sized(value: Any) -> Any:
    if not isinstance(value, int | float | None):
        now().size(value)
    return value


def _made(value: Any) -> Any:
    return now().made(value)


@jinja2.pass_eval_context
def _concat(context: nodes.EvalContext, *parts: Any) -> str:
    meter = now()
    meter.room(sum(map(meter.size, parts)))
    join = jinja2.runtime.markup_join if context.autoescape else jinja2.runtime.str_join
    return str(meter.made(join(parts)))


def _printed(value: Any) -> Any:
    meter = now()
    meter.spend(meter.size(value))
    return value


def _no_lipsum(*_: Any, **__: Any) -> str:
    raise jinja2.exceptions.SecurityError("lipsum is random text; no prompt is made of it")


# Filters and tests that look at no more than the outside of their arguments.
