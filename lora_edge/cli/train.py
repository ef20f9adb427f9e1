"""``lora-edge train``: a base and data -> a PEFT adapter, and with --export a bundle."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_edge.cli import options
from lora_edge.cli.progress import Bar, Lines
from lora_edge.training.presets import PRESETS
from lora_edge.training.settings import (
    BASE_FORMATS,
    BIASES,
    DEVICES,
    INITS,
    PRECISIONS,
    SCHEDULES,
    Settings,
)

if TYPE_CHECKING:
    from lora_edge.training.record import Recipe

_NUMBER = re.compile(r"\d+(\.\d+)?")
_REGEX_SIGNS = re.compile(r"[\\^$*+?()\[\]{}|]")
_SPAN = re.compile(r"(\d+)(?:-(\d+))?")

Command = Callable[..., None]


def _pattern(text: str) -> tuple[str, str]:
    key, separator, number = text.rpartition("=")
    if not (key and separator and _NUMBER.fullmatch(number)):
        raise click.BadParameter(f"{text!r} is not KEY=NUMBER, such as q_proj=4")
    return key, number


def _layers(_context: Any, _parameter: Any, text: str | None) -> tuple[int, ...] | None:
    """``0,2-4`` -> 0, 2, 3, 4."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        match = _SPAN.fullmatch(part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise click.BadParameter(f"{part!r} is not a layer or a span such as 4-7")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(found)


def _names(_context: Any, _parameter: Any, text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(x.strip() for x in text.split(",") if x.strip())


def _setting(name: str, help: str, **more: Any) -> Callable[[Command], Command]:
    """An option that is a field of Settings: not given, a preset or the default decides."""
    field = name.removeprefix("--").partition("/")[0].replace("-", "_")
    usual = {entry.name: entry.default for entry in fields(Settings)}[field]
    if isinstance(usual, bool):
        more |= {"is_flag": True, "flag_value": True}
    elif usual is not None and not isinstance(usual, tuple):
        more.setdefault("type", type(usual))
        help = f"{help}  [default: {usual}]"
    return click.option(name, field, default=None, help=help, **more)


def _patterns(what: str) -> Callable[[Command], Command]:
    """A setting of its own for some modules."""
    return click.option(
        f"--{what}-pattern",
        f"{what}_patterns",
        multiple=True,
        type=_pattern,
        metavar=f"KEY={what.upper()}",
        help=f"Another {what} for the modules of this name or regex. Repeatable; the first match "
        "wins.",
    )


@click.command()
@click.argument("base", required=False)
@click.argument("data", required=False, type=click.Path(path_type=Path))
@options.path("-o", "--output", help="The adapter's folder.")
@options.path(
    "--eval",
    "evaluation",
    metavar="DATA",
    help="Data to evaluate on; the weights that do best on it are kept.",
)
@_setting("--eval-split", "Or keep this share of the data for that.")
@_setting("--eval-every", "Steps between evaluations.  [default: an epoch]", type=int)
@_setting("--patience", "Stop after so many evaluations without a better loss.", type=int)
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    help="Other defaults: " + "; ".join(f"{x}: {', '.join(y)}" for x, y in PRESETS.items()) + ".",
)
@options.path(
    "--from",
    "recipe",
    metavar="RECORD",
    help="An adapter's training.json: its base, data and options, unless others are given.",
)
@_setting("--rank", "r of every adapted module.")
@_setting("--alpha", "The scaling is alpha / rank.")
@click.option(
    "--target-modules",
    help="Module names with commas between (q_proj,v_proj), or a regex over whole module paths. "
    "[default: every linear layer but the output head]",
)
@_setting("--layers", "Only these layers, such as 0,4-7.", callback=_layers)
@_setting("--rslora", "Scale by alpha / sqrt(rank).")
@_setting("--dora", "Train a magnitude for each output besides.")
@_setting("--loraplus-ratio", "LoRA+: learning rate of B over that of A; 4 to 16 is common.")
@_patterns("rank")
@_patterns("alpha")
@_setting("--dropout", "On the input of lora_A.")
@_setting("--bias", "Which of the base's biases are trained.", type=click.Choice(BIASES))
@_setting(
    "--modules-to-save", "Modules that are trained whole: names with commas.", callback=_names
)
@_setting(
    "--init",
    "How the factors begin; pissa and olora are saved as LoRAs of twice the rank.",
    type=click.Choice(INITS),
)
@_setting("--epochs", "Passes over the data.")
@_setting("--max-steps", "Optimizer steps, in place of --epochs.", type=int)
@_setting("--lr", "Peak learning rate.")
@_setting("--schedule", "Of the learning rate, after the warm-up.", type=click.Choice(SCHEDULES))
@_setting("--warmup", "Share of the steps in which the learning rate rises.")
@_setting("--weight-decay", "AdamW's; keeps the adapter's change to the base small.")
@_setting("--max-grad-norm", "Larger gradients are scaled down to this.")
@_setting("--batch-size", "Examples per forward pass and process.")
@_setting("--accumulate", "Forward passes per step and process.")
@_setting("--gradient-checkpointing", "Compute activations twice: less memory, slower.")
@_setting("--precision", "Of the computation (autocast).", type=click.Choice(PRECISIONS))
@_setting(
    "--base-format",
    "Of the frozen base: bf16 halves its memory; 4bit is QLoRA, on CUDA only.",
    type=click.Choice(BASE_FORMATS),
)
@_setting("--device", "auto is cuda where there is one.", type=click.Choice(DEVICES))
@_setting(
    "--max-length",
    "Tokens per example.  [default: 1024, or fewer where the base has fewer positions]",
    type=int,
)
@_setting("--drop-too-long", "Leave out examples with no target within --max-length.")
@_setting("--packing", "Several examples in one row, each blind to the others.")
@_setting("--group-by-length", "Examples of like length in one batch: less padding.")
@_setting("--full-logits", "Compute the output head where there is no target, too.")
@_setting("--save-every", "Steps between checkpoints.  [default: a tenth of the run]", type=int)
@_setting("--seed", "The same seed gives the same bytes.")
@_setting("--deterministic", "Deterministic algorithms only; a CPU's are in any case.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint of an interrupted run.")
@click.option("--dry-run", is_flag=True, help="Say what would be trained, and stop.")
@options.path(
    "--export",
    "bundle",
    metavar="DIR",
    help="Export base and adapter to this bundle afterwards, and validate it.",
)
@options.choice("--export-mode", ["switchable", "merged"], "As export's --mode.")
@click.option("--force", is_flag=True, help="Replace an adapter that is already in the folder.")
def command(
    base: str | None,
    data: Path | None,
    output: Path | None,
    *,
    evaluation: Path | None,
    preset: str | None,
    recipe: Path | None,
    target_modules: str | None,
    rank_patterns: tuple[tuple[str, str], ...],
    alpha_patterns: tuple[tuple[str, str], ...],
    resume: bool,
    dry_run: bool,
    bundle: Path | None,
    export_mode: str,
    force: bool,
    **values: Any,
) -> None:
    """Train a LoRA adapter for BASE (a folder or hub id) on DATA.

    DATA is a jsonl or csv file, or a folder of images by label. A generator learns from {"prompt",
    "completion"}, {"messages"} (by the base's chat template) or {"text"}: the loss is on the
    completion, or the assistant's turns, and the end token after it. {"text", "label"}, or images,
    make a classifier with its head. Prints the adapter's folder.

    Ctrl-C ends the run after its step and keeps a checkpoint: --resume goes on. Several processes:
    accelerate launch -m lora_edge.cli train …, or torchrun.
    """
    given = {key: value for key, value in values.items() if value is not None}
    if target_modules is not None:
        given["target_modules"] = split_targets(target_modules)
    if rank_patterns:
        given["rank_pattern"] = {key: _whole(number) for key, number in rank_patterns}
    if alpha_patterns:
        given["alpha_pattern"] = {key: float(number) for key, number in alpha_patterns}
    settings = Settings()
    known: Recipe | None = None
    if recipe is not None:
        from lora_edge.training.record import read_recipe

        known = read_recipe(recipe)
        settings = known.settings
        base = base or known.base
        data = data or (Path(known.data) if known.data else None)
        if evaluation is None and known.evaluation and "eval_split" not in given:
            evaluation = Path(known.evaluation)
    if base is None or data is None:
        raise click.UsageError(
            "the record does not say where its data lies; give BASE and DATA"
            if known is not None
            else "give BASE and DATA, or --from RECORD"
        )
    settings = replace(settings, **{**PRESETS.get(preset or "", {}), **given})
    if dry_run:
        _print_plan(base, data, evaluation, settings)
        return
    if output is None:
        raise click.UsageError("give the adapter's folder with -o")
    if bundle is not None:
        from lora_edge.bundle.manifest import MANIFEST_NAME
        from lora_edge.files.transaction import check_free

        check_free(bundle, marker=MANIFEST_NAME, force=force)
        _bundle_name(output)
    changed = bool(given or preset)
    _run(base, data, evaluation, output, settings, known, changed, resume=resume, force=force)
    if _first_process():
        if bundle is not None:
            _export(base, output, bundle, export_mode, force=force)
        click.echo(output)


def _run(
    base: str,
    data: Path,
    evaluation: Path | None,
    output: Path,
    settings: Settings,
    known: Recipe | None,
    changed: bool,
    *,
    resume: bool,
    force: bool,
) -> None:
    from lora_edge.files.hashes import hash_file
    from lora_edge.training import train
    from lora_edge.training.record import check_recipe, versions

    def notify(line: str) -> None:
        click.echo(line, err=True)

    if known is not None and not changed:
        check_recipe(known, base, data, evaluation)
        others = [x for x, y in versions().items() if known.versions.get(x) != y]
        if others:
            notify(f"the record was made with other versions of {', '.join(others)}")
    shown = Bar() if sys.stderr.isatty() else Lines()
    try:
        train(
            base,
            data,
            output,
            evaluation=evaluation,
            settings=settings,
            resume=resume,
            force=force,
            progress=shown,
            notify=notify,
        )
    finally:
        shown.close()
    if known is not None and not changed and known.adapter_sha256 and _first_process():
        same = hash_file(output / "adapter_model.safetensors") == known.adapter_sha256
        notify("the same bytes as the record's" if same else "OTHER BYTES than the record's")


def _print_plan(base: str, data: Path, evaluation: Path | None, settings: Settings) -> None:
    from lora_edge.training import plan

    made = plan(
        base,
        data,
        evaluation=evaluation,
        settings=settings,
        notify=lambda line: click.echo(line, err=True),
    )
    memory = made.memory
    share = made.trainable / made.parameters
    lines = [
        f"trainable   {made.trainable:,} parameters, {share:.2%} of the base's {made.parameters:,}",
        f"steps       {made.steps}",
        f"memory      about {_size(memory.total)}: base {_size(memory.base)}, adapter with "
        f"gradients and optimizer {_size(memory.trained)}, activations {_size(memory.activations)}"
        + (f", gaps between them up to {_size(memory.gaps)}" if memory.gaps else "")
        + (
            f", libraries and data {_size(memory.process)}"
            if memory.process
            else "; libraries and device context come on top"
        ),
    ]
    for mode, refusals in made.modes.items():
        lines += [f"{mode:<11} {'yes' if not refusals else f'no: {refusals[0].message}'}"]
        lines += [f"{'':<11} → {refusal.hint}" for refusal in refusals[:1]]
    if made.base is not None:
        lines += [f"base        no: {made.base.message}", f"{'':<11} → {made.base.hint}"]
    lines += [f"modules     {len(made.modules)}"]
    lines += [f"  {path}" for path in made.modules]
    click.echo("\n".join(lines))


def _export(base: str, adapter: Path, bundle: Path, mode: str, *, force: bool) -> None:
    from lora_edge.adapter.directory import read_training
    from lora_edge.exporting.export import export

    kind = read_training(adapter).get("data", {}).get("kind")
    export(
        base,
        {_bundle_name(adapter): adapter},
        mode="merged" if mode == "merged" else "switchable",
        output=bundle,
        task="image-classification" if kind == "image" else None,
        force=force,
        progress=lambda line: click.echo(line, err=True),
    )
    click.echo(f"exported to {bundle}, which passed its check", err=True)


def _bundle_name(adapter: Path) -> str:
    """What the adapter is called in the bundle: as its folder, as far as that is possible.

    Raises:
        AdapterError: it is not.
    """
    from lora_edge.adapter.load import check_name
    from lora_edge.names import NONE_ADAPTER

    name = re.sub(r"[^A-Za-z0-9_-]", "-", adapter.resolve().name)
    return check_name("adapter" if name == NONE_ADAPTER else name)


def _first_process() -> bool:
    from lora_edge.training.devices import process

    return process() == 0


def _size(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / (1 << 10):.0f} KiB"


def split_targets(text: str) -> str | tuple[str, ...]:
    """``a,b`` -> names; a text with regex signs, or ``all-linear``, stays one text."""
    if text == "all-linear" or _REGEX_SIGNS.search(text):
        return text
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _whole(number: str) -> int:
    if not number.isdecimal():
        raise click.BadParameter(f"--rank-pattern: {number} is not a whole number")
    return int(number)
