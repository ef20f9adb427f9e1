"""``lora-edge add``: further adapters for an existing bundle."""

from __future__ import annotations

import click

from lora_edge.bundle.manifest import aspect_names
from lora_edge.cli import options
from lora_edge.cli.arguments import named_paths


@options.command()
@click.argument("bundle")
@options.adapters(
    "A PEFT directory, a hub id or a folder of MLX-LM, and what to call it.", required=True
)
@click.option(
    "--base",
    help="The bundle's base, for adapters whose tensors follow from its weights: DoRA, trained "
    "biases and token rows, modules_to_save.",
)
def command(bundle: str, adapters: tuple[str, ...], base: str | None) -> None:
    """Add PEFT adapters to BUNDLE; its graph and weights are not touched. Needs no PyTorch.

    The graph must have the inputs that they need (`lora-edge inspect BUNDLE` shows its kinds); one
    that needs another is refused, by name. They are unproved until `lora-edge validate BUNDLE
    --reference BASE` has seen them.
    """
    from lora_edge.exporting.add import add

    named = named_paths(adapters)
    result = add(bundle, named, base)
    for name in named:
        click.echo(f"added {name}: unproved until validate --reference has seen it", err=True)
        text = result.manifest.adapters[name].text
        if text:
            click.echo(f"{name} brings its own {aspect_names(text)}", err=True)
    click.echo(result.directory)
