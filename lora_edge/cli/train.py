"""``lora-edge train``: a base and data -> a PEFT adapter, and with --export a bundle."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_edge.cli import options, settings
from lora_edge.cli.plan import plan_lines
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


@options.command()
@click.argument("base", required=False)
@click.argument("data", required=False, type=click.Path(path_type=Path))
@options.path("-o", "--output", help="The adapter's folder.")
@options.path(
    "--eval",
    "evaluation",
    metavar="DATA",
    help="Data to evaluate on; the weights that do best on it are kept.",
)
@settings.setting("--eval-split", "Or keep this share of the data for that.")
@settings.setting("--eval-every", "Steps between evaluations.  [default: an epoch]", type=int)
@settings.setting("--patience", "Stop after so many evaluations without a better loss.", type=int)
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
@settings.setting("--rank", "r of every adapted module.")
@settings.setting("--alpha", "The scaling is alpha / rank.")
@click.option(
    "--target-modules",
    callback=settings.targets,
    help="Module names with commas between (q_proj,v_proj), or a regex over whole module paths. "
    "[default: every linear layer but the output head]",
)
@settings.setting("--layers", "Only these layers, such as 0,4-7.", callback=settings.layers)
@settings.setting("--rslora", "Scale by alpha / sqrt(rank).")
@settings.setting("--dora", "Train a magnitude for each output besides.")
@settings.setting(
    "--loraplus-ratio", "LoRA+: learning rate of B over that of A; 4 to 16 is common."
)
@settings.pattern("rank", settings.whole)
@settings.pattern("alpha", float)
@settings.setting("--dropout", "On the input of lora_A.")
@settings.setting("--bias", "Which of the base's biases are trained.", type=click.Choice(BIASES))
@settings.setting(
    "--modules-to-save",
    "Modules that are trained whole: names with commas.",
    callback=settings.names,
)
@settings.setting(
    "--init",
    "How the factors begin; pissa and olora are saved as LoRAs of twice the rank.",
    type=click.Choice(INITS),
)
@settings.setting("--epochs", "Passes over the data.")
@settings.setting("--max-steps", "Optimizer steps, in place of --epochs.", type=int)
@settings.setting("--lr", "Peak learning rate.")
@settings.setting(
    "--schedule", "Of the learning rate, after the warm-up.", type=click.Choice(SCHEDULES)
)
@settings.setting("--warmup", "Share of the steps in which the learning rate rises.")
@settings.setting("--weight-decay", "AdamW's; keeps the adapter's change to the base small.")
@settings.setting("--max-grad-norm", "Larger gradients are scaled down to this.")
@settings.setting("--batch-size", "Examples per forward pass and process.")
@settings.setting("--accumulate", "Forward passes per step and process.")
@settings.setting("--gradient-checkpointing", "Compute activations twice: less memory, slower.")
@settings.setting("--precision", "Of the computation (autocast).", type=click.Choice(PRECISIONS))
@settings.setting(
    "--base-format",
    "Of the frozen base: bf16 halves its memory; 4bit is QLoRA, on CUDA only.",
    type=click.Choice(BASE_FORMATS),
)
@settings.setting("--device", "auto is cuda where there is one.", type=click.Choice(DEVICES))
@settings.setting(
    "--max-length",
    "Tokens per example.  [default: 1024, or fewer where the base has fewer positions]",
    type=int,
)
@settings.setting("--drop-too-long", "Leave out examples with no target within --max-length.")
@settings.setting("--packing", "Several examples in one row, each blind to the others.")
@settings.setting("--group-by-length", "Examples of like length in one batch: less padding.")
@settings.setting("--full-logits", "Compute the output head where there is no target, too.")
@settings.setting(
    "--save-every", "Steps between checkpoints.  [default: a tenth of the run]", type=int
)
@settings.setting("--seed", "The same seed gives the same bytes.")
@settings.setting("--deterministic", "Deterministic algorithms only; a CPU's are in any case.")
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
    chosen = Settings()
    known: Recipe | None = None
    if recipe is not None:
        from lora_edge.training.record import read_recipe

        known = read_recipe(recipe)
        chosen = known.settings
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
    chosen = replace(chosen, **{**PRESETS.get(preset or "", {}), **given})
    if dry_run:
        from lora_edge.training import plan

        made = plan(base, data, evaluation=evaluation, settings=chosen, notify=_say)
        click.echo("\n".join(plan_lines(made)))
        return
    if output is None:
        raise click.UsageError("give the adapter's folder with -o")
    if bundle is not None:
        from lora_edge.bundle.manifest import MANIFEST_NAME
        from lora_edge.files.transaction import check_free

        check_free(bundle, marker=MANIFEST_NAME, force=force)
        _bundle_name(output)
    changed = bool(given or preset)
    _run(base, data, evaluation, output, chosen, known, changed, resume=resume, force=force)
    if _first_process():
        if bundle is not None:
            _export(base, output, bundle, export_mode, force=force)
        click.echo(output)


def _run(
    base: str,
    data: Path,
    evaluation: Path | None,
    output: Path,
    chosen: Settings,
    known: Recipe | None,
    changed: bool,
    *,
    resume: bool,
    force: bool,
) -> None:
    from lora_edge.files.hashes import hash_file
    from lora_edge.training import train
    from lora_edge.training.record import check_recipe, versions

    if known is not None and not changed:
        check_recipe(known, base, data, evaluation)
        others = [x for x, y in versions().items() if known.versions.get(x) != y]
        if others:
            _say(f"the record was made with other versions of {', '.join(others)}")
    shown = Bar() if sys.stderr.isatty() else Lines()
    try:
        train(
            base,
            data,
            output,
            evaluation=evaluation,
            settings=chosen,
            resume=resume,
            force=force,
            progress=shown,
            notify=_say,
        )
    finally:
        shown.close()
    if known is not None and not changed and known.adapter_sha256 and _first_process():
        same = hash_file(output / "adapter_model.safetensors") == known.adapter_sha256
        _say("the same bytes as the record's" if same else "OTHER BYTES than the record's")


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
        progress=_say,
    )
    _say(f"exported to {bundle}, which passed its check")


def _bundle_name(adapter: Path) -> str:
    """What the adapter is called in the bundle: as its folder, as far as that is possible.

    Raises:
        AdapterError: it is not.
    """
    from lora_edge.adapter.load import check_name
    from lora_edge.names import NONE_ADAPTER

    name = re.sub(r"[^A-Za-z0-9_-]", "-", adapter.resolve().name)
    return check_name("adapter" if name == NONE_ADAPTER else name)


def _say(line: str) -> None:
    click.echo(line, err=True)


def _first_process() -> bool:
    from lora_edge.training.devices import process

    return process() == 0
