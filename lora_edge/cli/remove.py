"""``lora-edge remove``: adapters out of a bundle."""

from __future__ import annotations

import click

from lora_edge.cli import options


@options.command()
@click.argument("bundle")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def command(bundle: str, names: tuple[str, ...]) -> None:
    """Remove adapters from BUNDLE; its graph and weights are not touched. Needs no PyTorch.

    Golden cases in which they take part go too, blends and mixed batches included; `lora-edge
    validate BUNDLE --reference BASE` records those of the adapters that are left again.
    """
    from lora_edge.exporting.remove import remove

    result = remove(bundle, names, progress=lambda line: click.echo(line, err=True))
    click.echo(result.directory)
