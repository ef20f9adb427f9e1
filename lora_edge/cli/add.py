"""``lora-edge add``: further adapters for an existing bundle."""

from __future__ import annotations

import click

from lora_edge.cli.arguments import named_paths


@click.command()
@click.argument("bundle")
@click.option(
    "-a",
    "--adapter",
    "adapters",
    multiple=True,
    required=True,
    metavar="NAME=DIR",
    help="Repeatable.",
)
@click.option(
    "--base", help="The bundle's base, for adapters whose tensors follow from its weights (DoRA …)."
)
def command(bundle: str, adapters: tuple[str, ...], base: str | None) -> None:
    """Add PEFT adapters to BUNDLE; its graph and weights are not touched. Needs no PyTorch.

    They are unproved until `lora-edge validate BUNDLE --reference BASE` has seen them.
    """
    from lora_edge.exporter import add

    named = named_paths(adapters)
    result = add(bundle, named, base)
    for name in named:
        click.echo(f"added {name}: unproved until validate --reference has seen it", err=True)
    click.echo(result.directory)
