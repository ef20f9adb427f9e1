"""``lora-edge run``: complete prompts with a bundle."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import click

from lora_edge.cli import options
from lora_edge.cli.arguments import named_options, weighted_names
from lora_edge.errors import DataError


@options.command()
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
@click.option("--text", help="The text to label or embed; - reads it from stdin.")
@click.option("--pair", help="A second text that belongs to --text.")
@click.option("--image", type=click.Path(), help="The image to label (needs lora-edge[image]).")
@options.path(
    "--input",
    "input_file",
    help='jsonl of {"prompt" | "text" | "image": ..., "adapter": name | null | {name: weight}}, '
    "run as one batch.",
)
@click.option("--top", type=click.IntRange(min=1), help="Show so many labels.  [default: all]")
@click.option("--max-new-tokens", type=int, help="At most so many a prompt.  [default: 64]")
@click.option("--temperature", type=float, help="0 is greedy.  [default: 0]")
@click.option("--top-k", type=int, help="0 is all.  [default: 0]")
@click.option("--top-p", type=float, help="1 is all.  [default: 1]")
@click.option("--min-p", type=float, help="0 is all.  [default: 0]")
@click.option("--repetition-penalty", type=float, help="1 is none.  [default: 1]")
@click.option("--seed", type=int)
@options.repeatable("--stop", help="End before this string.")
@click.option(
    "--chat",
    is_flag=True,
    help="Put the prompt through the chat template. Options that are not given are then as the "
    "model's generation_config.json says.",
)
@click.option("--stream", is_flag=True, help="Print pieces as they come.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.option("--provider", default="cpu", show_default=True, help="Execution provider.")
@click.option("--threads", type=click.IntRange(1), help="Of each operator.  [default: the cores]")
@options.provider_options
@options.allow_fallback
@options.choice(
    "--verify",
    ["sampled", "full"],
    "Check large weights by some of their blocks, or every byte of the bundle, before.",
)
@click.option(
    "--no-cache",
    is_flag=True,
    help="Keep no optimized graph of large bundles in the user's cache (LORA_EDGE_CACHE).",
)
@click.option(
    "--exact",
    is_flag=True,
    help="Of a bundle of few bits or of fp16: compute in float32, as it is proved, not with int8 "
    "activations or in float16.",
)
@options.static
@options.repeatable(
    "--pin",
    "pinned",
    metavar="NAME",
    help="Run batches of this adapter alone (none: no adapter) as fast as merged, for one more "
    "copy of the weights in memory.",
)
def command(
    bundle: str,
    adapters: tuple[str, ...],
    prompt: str | None,
    text: str | None,
    pair: str | None,
    image: str | None,
    input_file: Path | None,
    top: int | None,
    stream: bool,
    as_json: bool,
    provider: str,
    threads: int | None,
    provider_options: tuple[str, ...],
    allow_fallback: bool,
    verify: Literal["sampled", "full"],
    no_cache: bool,
    pinned: tuple[str, ...],
    exact: bool,
    static: bool | None,
    **settings: Any,
) -> None:
    """Run BUNDLE: complete prompts, label texts or images, or embed texts, as its task is.

    stdout carries the results only: completions; lines of label and score; an embedding as JSON.
    """
    given = {"prompt": prompt, "text": text, "image": image}
    single = [(field, value) for field, value in given.items() if value is not None]
    if len(single) + (input_file is not None) != 1:
        raise click.UsageError("give one of --prompt, --text, --image and --input")
    if stream and (prompt is None or as_json):
        raise click.UsageError("--stream goes with --prompt, without --json")
    if pair is not None and text is None:
        raise click.UsageError("--pair goes with --text")
    from lora_edge.runtime import Runner
    from lora_edge.tasks.task import TASKS

    if settings["chat"]:
        settings["defaults"] = "model"
    default = weighted_names(adapters)
    runner = Runner(
        bundle,
        provider,
        threads=threads,
        provider_options=named_options(provider_options),
        allow_fallback=allow_fallback,
        pinned=pinned,
        session_cache=not no_cache,
        verify=verify,
        exact=exact,
        static=static,
    )
    task = runner.bundle.manifest.task
    field = TASKS[task].takes.replace("pixel_values", "image")
    if field not in given:
        raise click.UsageError(
            f"the bundle's task is {task}: give {field} to Runner.generate in Python"
        )
    if input_file is not None:
        rows = _read(input_file, field, default)
    else:
        name, value = single[0]
        if name != field:
            raise click.UsageError(f"the bundle's task is {task}: it takes --{field}, not --{name}")
        value = _stdin() if value == "-" and name != "image" else value
        rows = [(value if pair is None else (value, pair), default)]
    inputs, chosen = [value for value, _ in rows], [blend for _, blend in rows]
    if stream:
        with _said():
            pieces = runner.stream(str(inputs[0]), default, **settings)
        for piece in pieces:
            click.echo(piece, nl=False)
        click.echo()
        return
    with _said():
        results = _results(runner, task, inputs, chosen, top, settings)
    for (value, used), (found, lines) in zip(rows, results, strict=True):
        if as_json or input_file is not None:
            line = {field: value, "adapter": used, **found}
            click.echo(json.dumps(line, ensure_ascii=False))
        else:
            click.echo(lines)


@contextlib.contextmanager
def _said() -> Iterator[None]:
    """Warnings of the runner become notes on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        click.echo(f"note: {warning.message}", err=True)


def _results(
    runner: Any, task: str, inputs: list[Any], chosen: Any, top: int | None, settings: Any
) -> list[tuple[dict[str, Any], str]]:
    """What each input gives: as JSON, and as lines for people."""
    from lora_edge.tasks.task import TASKS

    facts = TASKS[task]
    if facts.verb == "generate":
        answers = runner.generate(inputs, chosen, **settings)
        return [({"completion": text}, text) for text in answers]
    answers = getattr(runner, facts.verb)(inputs, chosen)
    if facts.verb == "embed":
        vectors = [row.tolist() for row in answers]
        return [({"embedding": vector}, json.dumps(vector)) for vector in vectors]
    found = []
    for labels in answers:
        kept = labels if facts.by_token else labels[:top]
        names = [f"{x.text}\t{x.label}" if hasattr(x, "text") else x.label for x in kept]
        lines = [f"{name}\t{x.score:.4f}" for name, x in zip(names, kept, strict=True)]
        found.append(({"labels": [x._asdict() for x in kept]}, "\n".join(lines)))
    return found


def _stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise DataError(
            f"stdin is not {error.encoding}: {error.reason}", "Convert it to UTF-8."
        ) from error


def _read(file: Path, field: str, default: dict[str, float] | None) -> list[tuple[Any, Any]]:
    """The inputs of a jsonl file and the adapter of each.

    Raises:
        DataError: the file is missing, empty, or has a line that is not as expected.
    """
    from lora_edge.files.jsonl import read_jsonl

    like = f'Like {{"{field}": "..."}}, one object a line, in UTF-8.'
    rows: list[tuple[Any, Any]] = []
    for line in read_jsonl(file, DataError, "Give a jsonl file in UTF-8."):
        data = line.object(DataError, like)
        if not isinstance(data.get(field), str):
            raise DataError(f"{line.where}: {field!r} is missing or no text", like)
        pair = data.get("pair") if field == "text" else None
        if not isinstance(pair, str | None):
            raise DataError(f"{line.where}: 'pair' is no text", like)
        value = data[field] if pair is None else (data[field], pair)
        rows.append((value, data.get("adapter", default)))
    if not rows:
        raise DataError(f"{file} has no lines", f'Lines like {{"{field}": "..."}} are expected.')
    return rows
