"""``lora-edge package``: bundles as a model package of ONNX Runtime, and its check."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from lora_edge.cli import options
from lora_edge.cli.arguments import optional_name


@options.command()
@click.argument("bundles", nargs=-1, metavar="[PROVIDER=]BUNDLE...")
@options.path("-o", "--output", help="The package's folder.")
@click.option("--force", is_flag=True, help="Replace an earlier package in the folder.")
@options.link
@click.option(
    "--check",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Check a package: each file against its hash, and each variant against its golden cases.",
)
@click.pass_context
def command(
    context: click.Context,
    bundles: tuple[str, ...],
    output: Path | None,
    force: bool,
    link: bool,
    check: Path | None,
) -> None:
    """Write a model package of ONNX Runtime 1.32: a bundle for each execution provider.

    PROVIDER is cpu unless it is given. Weights, adapters and tokenizers that bundles have in
    common are in the package once.

    Exit code of --check: 0 passed, 1 a golden case failed, 2 a file was changed.
    """
    say = partial(click.echo, err=True)
    if check is not None:
        if bundles or output is not None:
            raise click.UsageError("--check takes a package, and neither bundles nor -o")
        if not _passes(check, say):
            context.exit(1)
        return
    if not bundles or output is None:
        raise click.UsageError("give a bundle and -o DIR, or --check DIR")
    from lora_edge.exporting.package import write_package

    given: dict[str, Path] = {}
    for name, path in map(optional_name, bundles):
        if (name or "cpu") in given:
            raise click.UsageError(f"two bundles are given for {name or 'cpu'}")
        given[name or "cpu"] = path
    made = write_package(given, output, force=force, link=link, progress=say)
    click.echo(made.directory)


def _passes(directory: Path, say: Callable[[str], None]) -> bool:
    """Check a package, and print the table of each variant."""
    from lora_edge.bundle.package import load_package
    from lora_edge.parity import validate

    package = load_package(directory)
    say("comparing each file and each shared asset with its hash")
    package.check()
    passed = True
    for name, variant in package.variants.items():
        with tempfile.TemporaryDirectory(prefix="lora-edge-package-") as folder:
            report = validate(variant.unpack(Path(folder), link=True), progress=say)
        click.echo(f"{name}:\n{report.table()}", nl=False)
        passed = passed and report.passed
    return passed
