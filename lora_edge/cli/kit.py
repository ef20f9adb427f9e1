"""``lora-edge kit``: a small project to start from."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from lora_edge.cli import options
from lora_edge.kits.kinds import KITS


@options.command()
@click.argument("bundle")
@click.argument("kind", type=click.Choice(list(KITS)), metavar="|".join(KITS))
@options.path("-o", "--output", required=True, help="The project's folder.")
@click.option("--force", is_flag=True, help="Replace an earlier kit in the folder.")
@options.link
def command(bundle: str, kind: str, output: Path, force: bool, link: bool) -> None:
    """Write a small project that runs BUNDLE: a page, a program, or part of an app.

    web and node are for text-generation, text-classification and feature-extraction, the others for
    text-generation. The project needs no lora-edge. cpp, csharp, android and ios take token ids;
    android and ios were not run yet.
    """
    from lora_edge.kits.kit import make_kit

    def say(line: str) -> None:
        click.echo(line, err=True)

    made = make_kit(bundle, kind, output, force=force, link=link, progress=say)
    click.echo(made.directory)
    say("next:")
    for line in (f"cd {shlex.quote(str(made.directory))}", *made.commands):
        say(f"  {line}")
