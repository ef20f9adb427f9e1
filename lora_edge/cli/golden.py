"""``lora-edge golden``: the user's own prompts as golden cases."""

from __future__ import annotations

from pathlib import Path

import click

from lora_edge.cli import options
from lora_edge.cli.arguments import named_paths


@options.command()
@click.argument("bundle")
@options.path(
    "--prompts",
    help='A prompt in each line, or a .jsonl of {"prompt", "adapter"}; without an adapter, it is '
    "run with all of them and with none.",
)
@click.option(
    "--reference",
    metavar="BASE",
    help="The base's folder or id, where it is not the one that the bundle names.",
)
@options.peft_files
@click.option(
    "--steps", type=click.IntRange(1), help="Greedy tokens after each prompt (default 16)."
)
@click.option(
    "--onnx-test-data",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write the graph and PyTorch's whole outputs in the layout of ONNX's backend tests, a "
    "data set for the base and one for each adapter, for onnx_test_runner and its like.",
)
def command(
    bundle: str,
    prompts: Path | None,
    reference: str | None,
    adapters: tuple[str, ...],
    steps: int | None,
    onnx_test_data: Path | None,
) -> None:
    """Run your own prompts through PyTorch, and keep the outcome in BUNDLE as golden cases.

    `lora-edge validate` runs them from then on, on the device too. Nothing is kept where the bundle
    differs from PyTorch on them: exit code 1.

    --onnx-test-data writes the same kind of proof for other tools, outside of BUNDLE.
    """
    from lora_edge.files.transaction import check_free
    from lora_edge.parity import add_goldens
    from lora_edge.parity.backend_data import write_onnx_test_data
    from lora_edge.parity.plan.examples import read_prompts

    if prompts is None and onnx_test_data is None:
        raise click.UsageError("give --prompts, --onnx-test-data or both")

    if onnx_test_data is not None:
        check_free(onnx_test_data, marker="model.onnx")

    def say(line: str) -> None:
        click.echo(line, err=True)

    named = named_paths(adapters)
    if prompts is not None:
        own = read_prompts(prompts)
        add_goldens(bundle, own, reference, adapters=named, steps=steps, progress=say)
        click.echo(bundle)
    if onnx_test_data is not None:
        write_onnx_test_data(bundle, onnx_test_data, reference, adapters=named, progress=say)
        click.echo(onnx_test_data)
