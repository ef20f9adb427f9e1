"""Options that several verbs share, and the shapes that options have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

Option = Callable[[Any], Any]
"""What gives a command an option: a decorator."""


class _Command(click.Command):
    """A verb. An option of one value that is given twice is refused: its last value would win."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            _, _, given = self.make_parser(ctx).parse_args(list(args))
            for option in given:
                repeats = isinstance(option, click.Option) and (option.multiple or option.is_flag)
                if option.param_type_name == "option" and not repeats and given.count(option) > 1:
                    raise click.UsageError(
                        f"{max(option.opts, key=len)} is given {given.count(option)} times, "
                        "expected once",
                        ctx,
                    )
        return super().parse_args(ctx, args)


def command() -> Callable[[Callable[..., None]], click.Command]:
    """A verb of the command line."""
    return click.command(cls=_Command)


def choice(name: str, values: Sequence[str], help: str) -> Option:
    """One of ``values``; the first is the default, and the help says so."""
    return click.option(
        name, type=click.Choice(values), default=values[0], show_default=True, help=help
    )


def count(name: str, default: int, help: str) -> Option:
    """A whole number from 1 on."""
    return click.option(name, type=click.IntRange(1), default=default, show_default=True, help=help)


def path(*names: str, help: str, **options: Any) -> Option:
    """A file or a folder."""
    return click.option(*names, type=click.Path(path_type=Path), help=help, **options)


def repeatable(*names: str, help: str, **options: Any) -> Option:
    """May be given several times; the help says so."""
    return click.option(*names, multiple=True, help=f"{help} Repeatable.", **options)


def adapters(help: str, **options: Any) -> Option:
    """``-a NAME=DIR``, for :func:`~lora_edge.cli.arguments.named_paths`."""
    return repeatable("-a", "--adapter", "adapters", metavar="NAME=DIR", help=help, **options)


peft_files = adapters("PEFT files of an adapter, where the bundle does not hold them.")
provider_options = repeatable(
    "--provider-option",
    "provider_options",
    metavar="K=V",
    help="An option of the execution provider itself, such as device_id=1.",
)
static = click.option(
    "--static/--no-static",
    default=None,
    help="Run the graph with fixed shapes, or the other.  [default: as the provider takes it]",
)
allow_fallback = click.option(
    "--allow-fallback",
    is_flag=True,
    help="Let the CPU run what the provider does not take.  [default: refuse]",
)
link = click.option(
    "--link",
    is_flag=True,
    help="Hard links to the bundle's files, which take no room of their own, in place of copies.",
)
