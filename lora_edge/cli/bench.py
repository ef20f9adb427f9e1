"""``lora-edge bench``: how fast a bundle is, beside itself and beside others."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from lora_edge.cli import options
from lora_edge.cli.arguments import named_paths

_FILE = click.Path(path_type=Path, dir_okay=False)


def _names(_context: Any, _parameter: Any, text: str | None) -> tuple[str, ...]:
    """``a,b`` -> names, each once."""
    return tuple(dict.fromkeys(x.strip() for x in (text or "").split(",") if x.strip()))


@options.command()
@click.argument("bundle")
@click.option(
    "--against",
    callback=_names,
    metavar="NAME,...",
    help="Others that run the same model: merged, genai, llama.cpp, openvino, peft, optimum.",
)
@click.option("-a", "--adapter", default="", help="The adapter that is on.  [default: the first]")
@click.option(
    "--only",
    callback=_names,
    metavar="FIGURE,...",
    help="Measure these alone: start, open, decode, memory, prefill, long, load, batch, switch, "
    "files.  [default: all]",
)
@options.count(
    "--processes",
    5,
    "Fresh processes of each contestant; one has no spread, and nothing is judged.",
)
@options.count("--steps", 16, "Turns of each contestant in each process.")
@options.count("--tokens", 128, "Of the prompt before decoding.")
@options.count("--long", 2048, "Tokens of the long context, or as many as the model has.")
@click.option("--threads", type=click.IntRange(1), help="Of each contestant.  [default: the cores]")
@click.option(
    "--cpu-time",
    is_flag=True,
    help="With --threads 1: count the time that it ran, for a machine that others use too.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the tokens and the order.")
@click.option("--base", default="", help="For merged and peft: the base model, a folder or hub id.")
@options.repeatable(
    "--peft", metavar="NAME=DIR", help="PEFT files of an adapter, where not the bundle's own."
)
@options.repeatable(
    "--with",
    "files",
    metavar="NAME=PATH",
    help="What a contestant runs: merged=BUNDLE, genai=DIR, openvino=DIR, optimum=DIR, "
    "llama.cpp=FILE.gguf, llama.cpp-lora=FILE.gguf, llama.cpp-library=DIR.",
)
@options.repeatable(
    "--python",
    "pythons",
    metavar="NAME=FILE",
    help="The Python of another environment with lora-edge in it, for a contestant whose packages "
    "do not go together with this one's.",
)
@click.option("--json", "json_file", type=_FILE, help="Write everything there.")
@click.option("--chart", "chart_file", type=_FILE, help="Write the ratios as SVG there.")
def command(
    bundle: str,
    against: tuple[str, ...],
    adapter: str,
    only: tuple[str, ...],
    processes: int,
    steps: int,
    tokens: int,
    long: int,
    threads: int | None,
    cpu_time: bool,
    seed: int,
    base: str,
    peft: tuple[str, ...],
    files: tuple[str, ...],
    pythons: tuple[str, ...],
    json_file: Path | None,
    chart_file: Path | None,
) -> None:
    """Measure how fast BUNDLE is, beside itself and beside others.

    Off, on, pinned, mixed batches, switching, loading, opening, memory and sizes. The contestants
    run in fresh processes and take turns in shuffled order. The reference takes part twice: its
    ratio to itself is what the measurement resolves, and smaller differences are not judged.

    stdout carries a table of ratios with their 95 % intervals.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = threads or cores or 1
    if cpu_time and count != 1:
        raise click.UsageError("--cpu-time is the time of one thread: give --threads 1")
    from lora_edge.bench.plan import Settings
    from lora_edge.bench.rivals import Given, rival
    from lora_edge.bench.run import run
    from lora_edge.bench.standard import FIGURES, Choices, chosen_adapter, standard_plan
    from lora_edge.bundle.bundle import load_bundle
    from lora_edge.reports.bench import chart, table

    opened = load_bundle(bundle)
    name = chosen_adapter(opened, adapter)
    with ExitStack() as stack:
        paths = named_paths(files)
        given = Given(
            opened,
            name,
            max(tokens, long) + 2 * steps + 64,
            paths,
            base,
            named_paths(peft),
            named_paths(pythons),
        )
        if "merged" in against and "merged" not in paths and base and name:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            paths["merged"] = _merge(given, Path(folder) / "merged")
        rivals = [rival(x, given) for x in against]
        choices = Choices(name, only or tuple(FIGURES), tokens, long, steps)
        plan = standard_plan(opened, choices, rivals)
        settings = Settings(processes, steps, count, "cpu" if cpu_time else "wall", seed)
        data = run(plan, settings, _about(opened, name), lambda line: click.echo(line, err=True))
    click.echo(table(data))
    if json_file is not None:
        json_file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if chart_file is not None:
        chart_file.write_text(chart(data), encoding="utf-8")


def _merge(given: Any, output: Path) -> str:
    """A merged bundle of the same base, adapter and precision, made for the comparison."""
    from lora_edge.exporting.export import export

    click.echo(f"merging {given.adapter} into the base, for the comparison", err=True)
    export(
        given.base,
        {given.adapter: given.peft_folder(given.adapter)},
        output=output,
        mode="merged",
        form=given.bundle.manifest.gives.form,
        precision=given.bundle.manifest.precision,
    )
    return str(output)


def _about(bundle: Any, adapter: str) -> dict[str, str]:
    manifest = bundle.manifest
    return {
        "bundle": bundle.directory.name,
        "base": manifest.base["name_or_path"],
        "mode": manifest.mode,
        "precision": manifest.precision,
        "adapter": adapter,
    }
