"""``lora-edge native``: the optional library that adds an adapter's branches in one pass."""

from __future__ import annotations

import click

from lora_edge.cli import options


@options.command()
@click.argument("action", type=click.Choice(["build", "status", "remove"]))
@click.option("--compiler", metavar="PATH", help="The C++ compiler (CXX, or c++, g++, clang++).")
def command(action: str, compiler: str | None) -> None:
    """Build, show or remove the native library of this device.

    Bundles of 32 MiB of weights and more run on it, on the CPU: with one adapter, or with an
    adapter for each row. It is compiled into the user's cache, for this processor and this release
    of ONNX Runtime, and compared with numpy before it is kept. Nothing needs it.
    LORA_EDGE_NATIVE=0 leaves it out.
    """
    from lora_edge.errors import OptionError

    if compiler is not None and action != "build":
        raise OptionError(f"--compiler is for build, not for {action}", "Leave it out.")
    if action == "build":
        from lora_edge.runtime.native.build import build

        click.echo(build(compiler, lambda line: click.echo(line, err=True)))
        return
    from lora_edge.runtime.native.library import library_file, remove, switched_off

    if action == "remove":
        click.echo("removed" if remove() else "not built")
    elif not library_file().is_file():
        click.echo("not built for this processor and this ONNX Runtime")
    else:
        off = "; turned off by LORA_EDGE_NATIVE=0" if switched_off() else ""
        click.echo(f"{library_file()}{off}")
