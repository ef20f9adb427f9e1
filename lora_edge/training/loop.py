"""``transformers.Trainer`` on tokenized examples: right padding, progress, the final loss."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lora_edge.errors import AdapterError
from lora_edge.training.data import IGNORED, ClassifiedExample, Tokenized, TokenizedExample
from lora_edge.training.settings import Settings

_REPORTS = 100  # how often a whole run reports
_WARMUP = 0.03  # share of the steps


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        step: optimizer steps done.
        steps: optimizer steps of the whole run.
        loss: mean loss per target token, or per text of a classifier (nats), since the last report.
        tokens_per_second: tokens per second, padding not counted, since the run began.
    """

    step: int
    steps: int
    loss: float
    tokens_per_second: float


@dataclass(frozen=True)
class Outcome:
    """What a run came to: optimizer steps, and the mean loss of its end (as in Progress)."""

    steps: int
    final_loss: float


def collate(
    examples: Sequence[Tokenized], pad_id: int, *, types: bool = False
) -> dict[str, torch.Tensor]:
    """``input_ids``, ``attention_mask`` ``[batch, seq] int64``, right-padded, and ``labels``.

    ``labels`` is ``[batch, seq]``, or ``[batch]`` for a classifier; with ``types``, a classifier
    also gets ``token_type_ids``.
    """
    width = max(len(example.input_ids) for example in examples)

    def padded(rows: Sequence[tuple[int, ...]], fill: int) -> torch.Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])

    batch = {
        "input_ids": padded([example.input_ids for example in examples], pad_id),
        "attention_mask": padded([(1,) * len(example.input_ids) for example in examples], 0),
    }
    classified = [example for example in examples if isinstance(example, ClassifiedExample)]
    if classified:
        batch["labels"] = torch.tensor([example.label for example in classified])
        if types:
            batch["token_type_ids"] = padded([example.type_ids for example in classified], 0)
    else:
        paired = [example for example in examples if isinstance(example, TokenizedExample)]
        batch["labels"] = padded([example.labels for example in paired], IGNORED)
    return batch


def fit(
    model: Any,
    examples: Sequence[Tokenized],
    settings: Settings,
    *,
    pad_id: int,
    types: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Outcome:
    """Train ``model``'s trainable parameters in place, on the CPU; see :func:`collate`.

    Raises:
        AdapterError: the loss or the weights are no longer finite.
    """
    steps = max(1, math.ceil(settings.epochs * math.ceil(len(examples) / settings.batch_size)))
    tokens = sum(len(example.input_ids) for example in examples) / len(examples)
    reporter = _Reporter(steps, tokens * settings.batch_size, progress)
    with tempfile.TemporaryDirectory(prefix="lora-edge-train-") as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                max_steps=steps,
                per_device_train_batch_size=settings.batch_size,
                learning_rate=settings.lr,
                lr_scheduler_type="linear",
                warmup_steps=math.ceil(_WARMUP * steps),
                weight_decay=settings.weight_decay,
                max_grad_norm=1.0,
                logging_steps=max(1, steps // _REPORTS),
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                use_cpu=True,
                seed=settings.seed,
            ),
            train_dataset=list(examples),
            data_collator=lambda batch: collate(batch, pad_id, types=types),
            callbacks=[reporter],
        )
        for noisy in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(noisy)
        trainer.train()
    if any(not p.isfinite().all() for p in model.parameters() if p.requires_grad):
        raise _diverged(steps, math.nan)
    return Outcome(steps, reporter.loss)


def _diverged(step: int, loss: float) -> AdapterError:
    return AdapterError(f"training diverged by step {step} (loss {loss})", "Lower --lr.")


class _Reporter(TrainerCallback):
    """Passes the trainer's log on, and stops a run that has diverged."""

    def __init__(
        self, steps: int, tokens_per_step: float, progress: Callable[[Progress], None] | None
    ) -> None:
        self.loss = math.nan
        self._steps = steps
        self._tokens_per_step = tokens_per_step
        self._progress = progress
        self._started = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._started = time.monotonic()

    def on_log(
        self,
        args: Any,  # noqa: ARG002
        state: Any,
        control: Any,  # noqa: ARG002
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        self.loss = float(logs["loss"])
        if not math.isfinite(self.loss):
            raise _diverged(state.global_step, self.loss)
        if self._progress is not None:
            seconds = max(time.monotonic() - self._started, 1e-9)
            rate = state.global_step * self._tokens_per_step / seconds
            self._progress(Progress(state.global_step, self._steps, self.loss, rate))
