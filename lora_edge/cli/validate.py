"""``lora-edge validate``: does a bundle do what PyTorch does?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_edge.cli import options
from lora_edge.cli.arguments import named_options, named_paths, optional_name

if TYPE_CHECKING:
    from lora_edge.parity.plan.plan import Depth


_FILE = click.Path(path_type=Path, dir_okay=False)


@options.command()
@click.argument("bundle")
@click.option("--reference", metavar="BASE", help="Compare with PyTorch: the base's folder or id.")
@click.option(
    "--quick", "depth", flag_value="quick", help="Continuations of 8 tokens; for every commit."
)
@click.option(
    "--full",
    "depth",
    flag_value="full",
    help="Every level of ONNX Runtime's optimization, and a switch between every two adapters.",
)
@options.repeatable(
    "--provider",
    "providers",
    metavar="NAME",
    help="Execution provider, strict (default cpu).",
)
@options.provider_options
@options.allow_fallback
@options.repeatable(
    "--optimization",
    "optimizations",
    type=click.Choice(["disable", "basic", "extended", "all"]),
    help="Level of ONNX Runtime's graph optimization (default all).",
)
@options.repeatable(
    "--in",
    "inside",
    metavar="CLIENT",
    help="Run the golden cases in another runtime: onnxruntime, static, qnn, openvino-ep, "
    "openvino, genai, node, web, webgpu, transformers.js, transformers.js-web, or "
    "command:PROGRAM (docs/clients.md).",
)
@options.repeatable(
    "--client",
    "places",
    metavar="CLIENT=WHERE",
    help="Where a client of --in is: a Python that has it, or a folder with node_modules.",
)
@options.peft_files
@click.option(
    "--steps",
    type=click.IntRange(1),
    help="Greedy tokens after each prompt (default 64; 16 above 20 M parameters).",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random prompts."
)
@options.path(
    "--prompts",
    help="Texts, one in each line, to run instead of random ones (with --reference).",
)
@options.repeatable(
    "--eval",
    "data",
    metavar="[NAME=]FILE",
    help='A .jsonl of {"prompt", "completion"} or {"text", "label"} for an adapter, or for all: '
    "compare a metric on it, under PyTorch and under the bundle (with --reference).",
)
@click.option(
    "--metric",
    type=click.Choice(["exact_match", "perplexity", "accuracy"]),
    help="Of --eval (default exact_match; accuracy of labels).",
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep what is finished in DIR, and go on from there when called again.",
)
@click.option(
    "--repro",
    type=click.Path(path_type=Path, file_okay=False),
    default="repro",
    show_default=True,
    help="Where the first failure leaves its smallest reproduction: inputs, both outputs, and a "
    "script for plain ONNX Runtime.",
)
@click.option(
    "--exact",
    is_flag=True,
    help="Of a bundle of few bits or of fp16, judge the graph that computes in float32 alone, and "
    "not what int8 activations or float16 add.",
)
@click.option(
    "--low-memory",
    is_flag=True,
    help="With --reference: run the graphs of a large base in float32 in parts, which takes "
    "longer; compare fewer prompts of a very large one in few bits, which the report says.",
)
@click.option("--json", "json_file", type=_FILE, help="Write the report there.")
@click.option("--html", "html_file", type=_FILE, help="Write it as one page for people.")
@click.option("--junit", "junit_file", type=_FILE, help="Write it for a CI's test view.")
@click.option("--markdown", "markdown_file", type=_FILE, help="Append it to a CI job's summary.")
@click.option(
    "--baseline",
    type=_FILE,
    help="An earlier report (--json): fail also where a figure got worse by more than its own "
    "spread.",
)
@click.pass_context
def command(
    context: click.Context,
    bundle: str,
    reference: str | None,
    depth: Depth | None,
    providers: tuple[str, ...],
    provider_options: tuple[str, ...],
    allow_fallback: bool,
    optimizations: tuple[str, ...],
    inside: tuple[str, ...],
    places: tuple[str, ...],
    adapters: tuple[str, ...],
    steps: int | None,
    seed: int,
    prompts: Path | None,
    data: tuple[str, ...],
    metric: str | None,
    resume: Path | None,
    repro: Path,
    exact: bool,
    low_memory: bool,
    json_file: Path | None,
    html_file: Path | None,
    junit_file: Path | None,
    markdown_file: Path | None,
    baseline: Path | None,
) -> None:
    """Check BUNDLE against PyTorch (--reference), or else against its own golden cases.

    Every adapter state runs on every provider with every level of optimization that is named.

    Exit code 0: passed. 1: an adapter differs from PyTorch, has no effect, is unproved, or is worse
    than the --baseline; or int8 activations or float16 add more than they may.
    """
    from lora_edge.files.transaction import write_atomically
    from lora_edge.parity import validate, validate_in
    from lora_edge.parity.plan.examples import read_examples, read_prompts
    from lora_edge.reports import compare, html, junit, load_report, markdown

    if prompts is not None and reference is None:
        raise click.UsageError("--prompts needs --reference; `lora-edge golden` keeps prompts")
    for file in (json_file, html_file, junit_file, markdown_file):
        if file is not None and not file.absolute().parent.is_dir():
            raise click.UsageError(f"the folder of {file} does not exist")
    earlier = None if baseline is None else load_report(baseline)
    if data and reference is None:
        raise click.UsageError("--eval needs --reference")
    say = partial(click.echo, err=True)
    if inside:
        _refuse_beside_clients(context)
        report = validate_in(
            clients_of(inside, named_options(places)),
            bundle,
            depth=depth or "normal",
            exact=exact,
            progress=say,
        )
    else:
        if places:
            raise click.UsageError("--client says where a client of --in is; give --in too")
        report = validate(
            bundle,
            reference,
            adapters=named_paths(adapters),
            provider=providers or "cpu",
            provider_options=named_options(provider_options),
            allow_fallback=allow_fallback,
            optimization=optimizations or None,
            depth=depth or "normal",
            steps=steps,
            seed=seed,
            prompts=[] if prompts is None else [prompt.text for prompt in read_prompts(prompts)],
            examples=[
                dataclasses.replace(example, adapter=example.adapter or name)
                for name, path in map(optional_name, data)
                for example in read_examples(path)
            ],
            metric=metric,
            resume=resume,
            repro=repro,
            exact=exact,
            low_memory=low_memory,
            progress=say,
        )
    found = report.to_data()
    worse = [] if earlier is None else compare(found, earlier)
    if json_file is not None:
        write_atomically(json_file, report.to_json())
    if html_file is not None:
        write_atomically(html_file, html(found, worse))
    if junit_file is not None:
        write_atomically(junit_file, junit(found, worse))
    if markdown_file is not None:
        with markdown_file.open("a", encoding="utf-8") as summary:
            summary.write(markdown(found, worse))
    click.echo(report.table(), nl=False)
    for each in worse:
        click.echo(f"worse: {each.text}")
    if not report.passed or worse:
        context.exit(1)


def clients_of(names: Sequence[str], places: Mapping[str, str]) -> dict[str, str | None]:
    """The clients that were asked for, each with its place, ``None`` where none was given."""
    odd = sorted(set(places) - set(names))
    if odd:
        raise click.UsageError(f"--client {odd[0]}=... is given, and no --in {odd[0]}")
    return {name: places.get(name) for name in names}


def _refuse_beside_clients(context: click.Context) -> None:
    """A client runs the recorded cases as they are, in a way of its own."""
    allowed = {"bundle", "inside", "places", "depth", "exact", "baseline"}
    files = {"json_file", "html_file", "junit_file", "markdown_file"}
    given = click.core.ParameterSource.COMMANDLINE
    for parameter in context.command.params:
        name = str(parameter.name)
        if name not in allowed | files and context.get_parameter_source(name) == given:
            raise click.UsageError(f"{parameter.opts[0]} cannot be given with --in")
