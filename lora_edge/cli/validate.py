"""``lora-edge validate``: does a bundle do what PyTorch does?"""

from __future__ import annotations

from pathlib import Path

import click

from lora_edge.cli.arguments import named_paths


@click.command()
@click.argument("bundle")
@click.option("--reference", metavar="BASE", help="Compare with PyTorch: the base's folder or id.")
@click.option(
    "-a",
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=DIR",
    help="PEFT files of an adapter, where the bundle does not hold them. Repeatable.",
)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Write the report there."
)
@click.pass_context
def command(
    context: click.Context,
    bundle: str,
    reference: str | None,
    adapters: tuple[str, ...],
    json_file: Path | None,
) -> None:
    """Check BUNDLE against PyTorch (--reference), or else against its own golden cases.

    Exit code 0: passed. 1: an adapter differs from PyTorch, has no effect, or is unproved.
    """
    from lora_edge.parity import validate

    report = validate(
        bundle,
        reference,
        adapters=named_paths(adapters),
        progress=lambda line: click.echo(line, err=True),
    )
    click.echo(report.table(), nl=False)
    if json_file is not None:
        json_file.write_text(report.to_json(), encoding="utf-8")
    if not report.passed:
        context.exit(1)
