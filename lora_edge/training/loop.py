"""``transformers.Trainer`` on tokenized examples: batches, loss, evaluation, checkpoints.

Knows torch, transformers and token ids; knows nothing of files of data or of adapters' formats.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback

from lora_edge.errors import InterruptedRunError
from lora_edge.training.batches import collate, size_of
from lora_edge.training.callbacks import Progress, Reporter, Stopper, diverged
from lora_edge.training.checkpoints import latest_checkpoint
from lora_edge.training.devices import processes
from lora_edge.training.head import TargetHead
from lora_edge.training.record import TENSORBOARD_NAME
from lora_edge.training.settings import Settings
from lora_edge.training.target_trainer import TargetTrainer
from lora_edge.training.tokens import PackedExample, Tokenized, TokenizedExample

_REPORTS = 100  # how often a whole run reports
_SAVES = 10
_LEAST_SAVE = 50  # steps


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        steps: optimizer steps.
        final_loss: mean loss of its end, as in :class:`~lora_edge.training.callbacks.Progress`.
        best_step: the step whose weights were kept, where evaluations chose them.
        evaluation: ``eval_loss``, ``eval_accuracy``, and ``eval_perplexity`` of a generator, of the
            weights that were kept; empty without evaluation.
    """

    steps: int
    final_loss: float
    best_step: int | None
    evaluation: dict[str, float]


@dataclass(frozen=True)
class Batches:
    """How examples become batches; see :func:`~lora_edge.training.batches.collate`."""

    pad_id: int
    types: bool = False
    pixels: Callable[[Sequence[str]], torch.Tensor] | None = None

    def __call__(self, examples: Sequence[Tokenized]) -> dict[str, torch.Tensor]:
        """One batch, with the number of its tokens under ``tokens``."""
        batch = collate(examples, self.pad_id, types=self.types, pixels=self.pixels)
        return batch | {"tokens": torch.tensor(sum(map(size_of, examples)))}


def steps_per_epoch(count: int, settings: Settings) -> int:
    """Optimizer steps in one pass over ``count`` rows."""
    batches = math.ceil(count / (settings.batch_size * processes()))
    return max(1, math.ceil(batches / settings.accumulate))


def steps_of(count: int, settings: Settings) -> int:
    """Optimizer steps of a whole run on ``count`` rows."""
    if settings.max_steps is not None:
        return settings.max_steps
    return max(1, math.ceil(settings.epochs * steps_per_epoch(count, settings)))


def fit(
    model: Any,
    examples: Sequence[Tokenized],
    settings: Settings,
    *,
    batches: Batches,
    run: Path,
    device: str = "cpu",
    evaluation: Sequence[Tokenized] = (),
    head: TargetHead | None = None,
    resume: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Outcome:
    """Train ``model``'s trainable parameters in place.

    Args:
        model: PEFT's wrapper around the base.
        examples: what is trained on.
        settings: how.
        batches: makes batches of examples.
        run: folder for checkpoints and metrics.jsonl.
        device: ``cpu`` or ``cuda``.
        evaluation: what is evaluated on; the weights of the best evaluation are kept.
        head: computes the output head on targets only; ``None``: the model's own loss is used.
        resume: checkpoint to go on from.
        progress: called about a hundred times.

    Raises:
        AdapterError: the loss or the weights are no longer finite.
        InterruptedRunError: Ctrl-C or a polite kill; a checkpoint was written.
    """
    steps = steps_of(len(examples), settings)
    args = _arguments(settings, steps, len(examples), run, device, evaluated=bool(evaluation))
    reporter = Reporter(run if args.process_index == 0 else None, progress)
    stopper = Stopper()
    callbacks: list[TrainerCallback] = [reporter, stopper]
    writer = _tensorboard(run) if args.process_index == 0 else None
    if settings.patience is not None:
        callbacks.append(EarlyStoppingCallback(settings.patience))
    if writer is not None:
        callbacks.append(TensorBoardCallback(writer))
    trainer = TargetTrainer(
        model,
        args,
        settings,
        head,
        reporter,
        train_dataset=list(examples),
        eval_dataset=list(evaluation) or None,
        data_collator=batches,
        callbacks=callbacks,
        compute_metrics=partial(_metrics, generates=_generates(examples)) if evaluation else None,
    )
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    try:
        with stopper.listening():
            trainer.train(resume_from_checkpoint=str(resume) if resume is not None else None)
    except KeyboardInterrupt:
        if latest_checkpoint(run) is None:
            raise
        raise _interrupted(trainer.state.global_step, steps, run) from None
    finally:
        if writer is not None:
            writer.close()  # else its thread goes on writing to a folder that may be gone
    if stopper.asked and trainer.state.global_step < steps:
        raise _interrupted(trainer.state.global_step, steps, run)
    if any(not p.isfinite().all() for p in model.parameters() if p.requires_grad):
        raise diverged(trainer.state.global_step, math.nan)
    best = trainer.state.best_global_step if evaluation else None
    kept = reporter.evaluation
    if best is not None:
        kept = next(
            {key: row[key] for key in _KEPT if key in row}
            for row in trainer.state.log_history
            if row["step"] == best and "eval_loss" in row
        )
    return Outcome(trainer.state.global_step, reporter.loss, best, kept)


def _interrupted(step: int, steps: int, run: Path) -> InterruptedRunError:
    return InterruptedRunError(
        f"interrupted at step {step} of {steps}; the checkpoint {latest_checkpoint(run)} is kept",
        "Give the same command with --resume to go on.",
    )


_KEPT = ("eval_loss", "eval_perplexity", "eval_accuracy")


def _arguments(
    settings: Settings, steps: int, count: int, run: Path, device: str, *, evaluated: bool
) -> TrainingArguments:
    save_every = settings.save_every or max(_LEAST_SAVE, steps // _SAVES)
    options: dict[str, Any] = {}
    if evaluated:
        every = settings.eval_every or steps_per_epoch(count, settings)
        every = min(every, steps)
        # The best weights can only be those of a checkpoint.
        save_every = every
        options = {
            "eval_strategy": "steps",
            "eval_steps": every,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        }
    if settings.gradient_checkpointing:
        # transformers 5 has a new name for it.
        names = {field.name for field in dataclasses.fields(TrainingArguments)}
        kind = "activation" if "activation_checkpointing" in names else "gradient"
        options[f"{kind}_checkpointing"] = True
        options[f"{kind}_checkpointing_kwargs"] = {"use_reentrant": False}
    if processes() > 1:
        options["ddp_backend"] = "gloo" if device == "cpu" else "nccl"
        options["ddp_find_unused_parameters"] = False
    made = TrainingArguments(
        output_dir=str(run),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr,
        lr_scheduler_type=(
            "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
        ),
        warmup_steps=math.ceil(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=max(1, steps // _REPORTS),
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=save_every,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device == "cuda",
        use_cpu=device == "cpu",
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        seed=settings.seed,
        full_determinism=settings.deterministic,
        **options,
    )
    if processes() == 1 and device == "cuda":
        made._n_gpu = 1  # else Trainer would split every batch over all devices in one process
    return made


def _tensorboard(run: Path) -> Any:
    """A writer of TensorBoard's events; ``None`` where it is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run / TENSORBOARD_NAME))


def _generates(examples: Sequence[Tokenized]) -> bool:
    return isinstance(examples[0], (TokenizedExample, PackedExample))


def _metrics(predictions: Any, *, generates: bool) -> dict[str, float]:
    """Over all targets of all examples, not the mean of batches' means."""
    loss, count, met = predictions.predictions.sum(axis=0).tolist()
    found = {"loss": loss / count, "accuracy": met / count}
    if generates:
        found["perplexity"] = math.exp(min(loss / count, 700.0))
    return {f"eval_{key}": value for key, value in found.items()}
