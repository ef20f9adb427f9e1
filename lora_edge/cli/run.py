"""``lora-edge run``: complete prompts with a bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from lora_edge.cli.arguments import weighted_names
from lora_edge.errors import DataError


@click.command()
@click.argument("bundle")
@click.option(
    "-a",
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME[=WEIGHT]",
    help="The adapter; several are blended. Repeatable.  [default: no adapter]",
)
@click.option("-p", "--prompt", help="The prompt; - reads it from stdin.")
@click.option(
    "--input",
    "input_file",
    type=click.Path(path_type=Path),
    help='jsonl of {"prompt": ..., "adapter": name | null | {name: weight}}, run as one batch.',
)
@click.option("--max-new-tokens", default=64, show_default=True, help="At most so many a prompt.")
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", default=0, show_default=True, help="0 is all.")
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--seed", type=int)
@click.option("--stop", multiple=True, help="End before this string. Repeatable.")
@click.option("--chat", is_flag=True, help="Put the prompt through the chat template.")
@click.option("--stream", is_flag=True, help="Print pieces as they come.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.option("--provider", default="cpu", show_default=True, help="Execution provider.")
def command(
    bundle: str,
    adapters: tuple[str, ...],
    prompt: str | None,
    input_file: Path | None,
    stream: bool,
    as_json: bool,
    provider: str,
    **settings: Any,
) -> None:
    """Complete a prompt, or a batch of them, with BUNDLE. stdout carries completions only."""
    if (prompt is None) == (input_file is None):
        raise click.UsageError("give either --prompt or --input")
    if stream and (input_file is not None or as_json):
        raise click.UsageError("--stream goes with --prompt, without --json")
    from lora_edge.runtime import Runner

    default = weighted_names(adapters)
    rows = _read(input_file, default) if input_file is not None else []
    runner = Runner(bundle, provider)
    if input_file is None:
        text = sys.stdin.read() if prompt == "-" else str(prompt)
        rows = [(text, default)]
        if stream:
            for piece in runner.stream(text, default, **settings):
                click.echo(piece, nl=False)
            click.echo()
            return
    adapter: Any = [blend for _, blend in rows]
    completions = runner.generate([text for text, _ in rows], adapter, **settings)
    for (text, used), completion in zip(rows, completions, strict=True):
        if as_json or input_file is not None:
            line = {"prompt": text, "adapter": used, "completion": completion}
            click.echo(json.dumps(line, ensure_ascii=False))
        else:
            click.echo(completion)


def _read(file: Path, default: dict[str, float] | None) -> list[tuple[str, Any]]:
    """The prompts of a jsonl file and the adapter of each.

    Raises:
        DataError: the file is missing, empty, or has a line that is not as expected.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist", "Give a jsonl file.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: {error.reason}", "Convert it to UTF-8.") from error
    rows: list[tuple[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{file}:{number} is not JSON: {error}", "One object a line."
            ) from error
        if not isinstance(data, dict) or not isinstance(data.get("prompt"), str):
            raise DataError(f"{file}:{number} has no text in 'prompt'", 'Like {"prompt": "..."}.')
        rows.append((data["prompt"], data.get("adapter", default)))
    if not rows:
        raise DataError(f"{file} has no prompts", 'Lines like {"prompt": "..."} are expected.')
    return rows
