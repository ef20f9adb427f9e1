"""Data and a base model -> a PEFT directory: the whole of ``lora-edge train``."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_edge import types as opt
from lora_edge.adapter.refusals import Mode, Refusal
from lora_edge.base.checkpoint import resolve_base
from lora_edge.base.quiet import quiet
from lora_edge.errors import AdapterError, MissingDependencyError
from lora_edge.files.hashes import hash_file
from lora_edge.files.transaction import check_free, staging
from lora_edge.training.data import DataFile
from lora_edge.training.images import read_source
from lora_edge.training.record import (
    METRICS_NAME,
    PLOT_NAME,
    RECORD_NAME,
    TENSORBOARD_NAME,
    card,
    plot,
    write_json,
)
from lora_edge.training.runs import header_of, running
from lora_edge.training.settings import Settings

if TYPE_CHECKING:
    from lora_edge.training.callbacks import Progress
    from lora_edge.training.estimate import Memory
    from lora_edge.training.loop import Outcome
    from lora_edge.training.prepare import Prepared

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What a run would do, found without a step of it.

    Attributes:
        parameters: of the base.
        trainable: that would be trained.
        modules: paths of the modules that get factors.
        memory: bytes that the run would hold.
        steps: optimizer steps.
        modes: mode of export -> the reasons why it would refuse the adapter; none: it takes it.
        base: why export's own backend refuses the base's architecture, if it does.
    """

    parameters: int
    trainable: int
    modules: tuple[str, ...]
    memory: Memory
    steps: int
    modes: Mapping[Mode, tuple[Refusal, ...]]
    base: Refusal | None


def train(
    base: str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    evaluation: str | os.PathLike[str] | None = None,
    settings: Settings | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
    notify: Notify | None = None,
    **options: Any,
) -> Path:
    """Train a LoRA adapter on texts, on prompts and completions, on chats, or on labelled texts.

    The loss is on completions, or the assistant's turns, and the end token after them. With labels,
    the adapter also carries the classifier's head, and the record names the labels in the head's
    order. The same arguments on the same machine give the same adapter. Written are PEFT's own
    ``adapter_config.json`` and ``adapter_model.safetensors``, the record of the run
    ``training.json``, ``metrics.jsonl``, ``loss.png`` and a model card. Until then, checkpoints are
    in ``OUTPUT.run`` beside the output.

    Args:
        base: folder or hub id of a causal language model; of any text model, or vision model for
            images, with or without a head, for labels.
        data: jsonl or csv file of ``{"text"}``, ``{"prompt", "completion"}``, ``{"messages"}``, or
            of ``{"text", "label"}``; or a folder of images, ``FOLDER/LABEL/IMAGE``.
        output: the adapter's folder; made whole or not at all.
        evaluation: another such file; the weights that do best on it are kept.
        settings: how to train; ``options`` go over them.
        resume: go on from the latest checkpoint of an interrupted run with the same arguments.
        force: replace ``output`` if it holds an adapter, and forget an interrupted run.
        progress: called about a hundred times during the run.
        notify: called with one-line remarks before the run.
        options: fields of :class:`~lora_edge.training.settings.Settings`.

    Returns:
        ``output``.

    Raises:
        DataError: the data cannot be read or used.
        BaseModelError: the base cannot be read or used.
        AdapterError: an option that cannot be meant, an adapter that no mode of export would take,
            or a run that diverged.
        BundleError: ``output`` is in the way, or an interrupted run is.
        MissingDependencyError: ``lora-edge[train]`` is not installed.
        InterruptedRunError: Ctrl-C or a polite kill; a checkpoint is kept.
    """
    chosen = _settings(settings, options, evaluation)
    target = Path(opt.path("output", output))
    opt.path("data", data)
    opt.flag("resume", resume)
    opt.flag("force", force)
    opt.called("progress", progress)
    opt.called("notify", notify)
    plain = target.name not in {"", ".."} and not target.is_symlink()
    place = target if plain else Path(os.path.realpath(target))
    run = place.parent / f"{place.name}.run"
    device = _check_environment(chosen)
    from lora_edge.training.devices import memory_errors, process
    from lora_edge.training.loop import fit, steps_of
    from lora_edge.training.sharding import whole_weights

    main = process() == 0
    tell = notify if notify is not None and main else lambda _: None
    if main:
        check_free(target, marker=CONFIG_NAME, force=force)
    with _one_process_group():
        source, judged = _read(data, evaluation)
        found = resolve_base(base)
        header = header_of(found, source, judged, chosen)
        with (
            running(run, header, resume=resume, force=force, main=main, notify=tell) as checkpoint,
            _staged(target, force, main=main) as stage,
            quiet(only=()),
            memory_errors(chosen),
        ):
            from lora_edge.training.prepare import (
                base_refusal,
                export_modes,
                keep_start,
                prepare,
            )

            prepared = prepare(found, source, judged, chosen, device, tell)
            _refuse_useless(export_modes(prepared, chosen, stage))
            refused = base_refusal(found, prepared.task)
            if refused is not None:
                tell(f"export will refuse this base: {refused.message} → {refused.hint}")
            start = keep_start(prepared, chosen, stage)
            if checkpoint is not None:
                tell(f"going on from {checkpoint}")
            outcome = fit(
                prepared.model,
                prepared.rows,
                chosen,
                batches=prepared.batches,
                run=run,
                device=device,
                evaluation=prepared.evaluation,
                head=prepared.head,
                resume=checkpoint,
                progress=progress if main else None,
            )
            if outcome.steps < steps_of(len(prepared.rows), chosen):
                tell(
                    f"stopped after step {outcome.steps}: no better for "
                    f"{chosen.patience} evaluations"
                )
            weights = whole_weights(prepared.model)
            if main:
                _write(stage, run, header, prepared, outcome, chosen, start, weights, tell)
    return target


def plan(
    base: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    evaluation: str | os.PathLike[str] | None = None,
    settings: Settings | None = None,
    notify: Notify | None = None,
    **options: Any,
) -> Plan:
    """What :func:`train` would do with these arguments; loads the base, trains nothing.

    Raises:
        DataError, BaseModelError, AdapterError, MissingDependencyError: as :func:`train`.
    """
    chosen = _settings(settings, options, evaluation)
    opt.path("data", data)
    opt.called("notify", notify)
    device = _check_environment(chosen)
    from lora_edge.training.devices import memory_errors
    from lora_edge.training.estimate import estimate
    from lora_edge.training.loop import steps_of
    from lora_edge.training.lora import adapted_paths
    from lora_edge.training.prepare import base_refusal, export_modes, prepare

    source, judged = _read(data, evaluation)
    found = resolve_base(base)
    with quiet(only=()), memory_errors(chosen), tempfile.TemporaryDirectory() as scratch:
        prepared = prepare(found, source, judged, chosen, device, notify or (lambda _: None))
        trainable, total = prepared.model.get_nb_trainable_parameters()
        return Plan(
            parameters=total - trainable,
            trainable=trainable,
            modules=tuple(adapted_paths(prepared.model)),
            memory=estimate(prepared.model, prepared.rows, chosen, prepared.batches, prepared.head),
            steps=steps_of(len(prepared.rows), chosen),
            modes=export_modes(prepared, chosen, Path(scratch)),
            base=base_refusal(found, prepared.task),
        )


def _settings(
    settings: Settings | None, options: Mapping[str, Any], evaluation: object
) -> Settings:
    if settings is not None and not isinstance(settings, Settings):
        raise opt.refused("settings", settings, "Settings")
    if evaluation is not None:
        opt.path("evaluation", evaluation)
    known = [field.name for field in dataclasses.fields(Settings)]
    for name in options:
        opt.one_of("a name of an option", name, known)
    given = dict(options)
    if given.get("target_modules", "") is None:
        del given["target_modules"]
    chosen = dataclasses.replace(settings or Settings(), **given)
    evaluated = evaluation is not None or chosen.eval_split
    if evaluation is not None and chosen.eval_split:
        raise AdapterError(
            "a file to evaluate on and eval_split are both given", "Give one of them."
        )
    for name in ("eval_every", "patience"):
        if getattr(chosen, name) is not None and not evaluated:
            raise AdapterError(
                f"{name} is set, and there is nothing to evaluate on",
                "Give --eval DATA or --eval-split SHARE.",
            )
    if chosen.save_every is not None and evaluated:
        raise AdapterError(
            "save_every is set beside an evaluation, which writes a checkpoint each time, so that "
            "the best weights are kept",
            "Use --eval-every.",
        )
    return chosen


def _check_environment(settings: Settings) -> str:
    try:
        import accelerate  # noqa: F401  Trainer imports it late, with a longer message
        import peft  # noqa: F401

        from lora_edge.training.devices import choose_device
    except ImportError as error:
        raise MissingDependencyError(
            f"training needs {error.name}", "Install it with: pip install 'lora-edge[train]'."
        ) from error
    return choose_device(settings)


def _read(
    data: str | os.PathLike[str], evaluation: str | os.PathLike[str] | None
) -> tuple[DataFile, DataFile | None]:
    source = read_source(Path(data))
    if evaluation is None:
        return source, None
    return source, read_source(Path(evaluation), source.labels or None)


@contextlib.contextmanager
def _staged(target: Path, force: bool, *, main: bool) -> Iterator[Path]:
    if main:
        with staging(target, force=force, marker=CONFIG_NAME) as stage:
            yield stage
    else:  # the other processes of a run write nothing
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)


@contextlib.contextmanager
def _one_process_group() -> Iterator[None]:
    import torch

    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _refuse_useless(modes: Mapping[Mode, tuple[Refusal, ...]]) -> None:
    """Refuse to spend hours on an adapter that no mode of export would take."""
    if all(modes.values()):
        refusal = next(iter(modes.values()))[0]
        raise AdapterError(
            f"no mode of export would take this adapter: {refusal.message}", refusal.hint
        )


def _write(
    stage: Path,
    run: Path,
    header: Mapping[str, Any],
    prepared: Prepared,
    outcome: Outcome,
    settings: Settings,
    start: Path | None,
    weights: dict[str, Any] | None,
    notify: Notify,
) -> None:
    from lora_edge.training.callbacks import read_metrics
    from lora_edge.training.lora import save_adapter

    save_adapter(prepared.model, stage, settings, start, weights)
    if start is not None:
        shutil.rmtree(start)
    record = _record(header, prepared, outcome, stage)
    write_json(stage / RECORD_NAME, record)
    (stage / "README.md").write_text(card(record), encoding="utf-8")
    if (run / METRICS_NAME).is_file():
        shutil.copy(run / METRICS_NAME, stage / METRICS_NAME)
    if (run / TENSORBOARD_NAME).is_dir():
        shutil.copytree(run / TENSORBOARD_NAME, stage / TENSORBOARD_NAME)
    if not plot(read_metrics(stage / METRICS_NAME), stage / PLOT_NAME):
        notify("no loss.png: it needs matplotlib (pip install 'lora-edge[train]')")


def _record(
    header: Mapping[str, Any], prepared: Prepared, outcome: Outcome, stage: Path
) -> dict[str, Any]:
    from lora_edge.training.batches import size_of
    from lora_edge.training.prepare import cut_counts, target_count

    record = dict(header)
    record["data"] = {
        **header["data"],
        "examples": len(prepared.examples),
        "tokens": sum(map(size_of, prepared.examples)),
        "target_tokens": target_count(prepared.examples),
        "examples_cut": len(cut_counts(prepared.examples)),
        "examples_dropped": prepared.dropped,
        "rows": len(prepared.rows),
    }
    if "evaluation" in header:
        record["evaluation"] = {**header["evaluation"], "examples": len(prepared.evaluation)}
    trainable, _ = prepared.model.get_nb_trainable_parameters()
    record["result"] = {
        "steps": outcome.steps,
        "final_loss": outcome.final_loss,
        "best_step": outcome.best_step,
        "evaluation": outcome.evaluation,
        "trainable_parameters": trainable,
        "adapter_sha256": hash_file(stage / WEIGHTS_NAME),
    }
    return record
