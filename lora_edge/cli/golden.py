"""``lora-edge golden``: the user's own prompts as golden cases."""

from __future__ import annotations

from pathlib import Path

import click

from lora_edge.cli.arguments import named_paths


@click.command()
@click.argument("bundle")
@click.option(
    "--prompts",
    required=True,
    type=click.Path(path_type=Path),
    help='A prompt in each line, or a .jsonl of {"prompt", "adapter"}; without an adapter, it is '
    "run with all of them and with none.",
)
@click.option(
    "--reference",
    metavar="BASE",
    help="The base's folder or id, where it is not the one that the bundle names.",
)
@click.option(
    "-a",
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=DIR",
    help="PEFT files of an adapter, where the bundle does not hold them. Repeatable.",
)
@click.option(
    "--steps", type=click.IntRange(1), help="Greedy tokens after each prompt (default 16)."
)
def command(
    bundle: str,
    prompts: Path,
    reference: str | None,
    adapters: tuple[str, ...],
    steps: int | None,
) -> None:
    """Run your own prompts through PyTorch, and keep the outcome in BUNDLE as golden cases.

    `lora-edge validate` runs them from then on, on the device too. Nothing is kept where the bundle
    differs from PyTorch on them: exit code 1.
    """
    from lora_edge.parity import add_goldens
    from lora_edge.parity.examples import read_prompts

    result = add_goldens(
        bundle,
        read_prompts(prompts),
        reference,
        adapters=named_paths(adapters),
        steps=steps,
        progress=lambda line: click.echo(line, err=True),
    )
    click.echo(result.directory)
