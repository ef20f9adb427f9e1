"""What watches a run: metrics.jsonl, progress, divergence, interrupts.

Knows transformers' callbacks; knows nothing of data or models.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from lora_edge.errors import AdapterError, DataError
from lora_edge.files.jsonl import read_jsonl
from lora_edge.files.schema import decode
from lora_edge.files.transaction import write_atomically
from lora_edge.training.record import METRICS_NAME

_HINT = "Remove the file; it is for people."

# What transformers calls them -> what the file calls them.
_TRAINED = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad_norm"}
_EVALUATED = ("eval_loss", "eval_perplexity", "eval_accuracy")


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        step: optimizer steps done.
        steps: optimizer steps of the whole run.
        loss: mean loss per target token, or per text of a classifier (nats), since the last report.
        tokens_per_second: tokens per second of all processes, padding not counted, since this
            process began; of images the images.
        tokens: read so far by this process and the others beside it, padding not counted.
        seconds_left: at this speed.
        eval_loss: of the latest evaluation; ``None`` before the first.
    """

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    tokens: int
    seconds_left: float
    eval_loss: float | None = None


def diverged(step: int, loss: float) -> AdapterError:
    """The error of a run whose loss or weights are no longer finite."""
    return AdapterError(
        f"training diverged by step {step} (loss {loss})",
        "Lower --lr, or raise --warmup; with --precision fp16, try bf16 or fp32.",
    )


class Reporter(TrainerCallback):
    """Writes metrics.jsonl and passes the trainer's log on."""

    def __init__(self, directory: Path | None, progress: Callable[[Progress], None] | None) -> None:
        """Report to ``directory`` and ``progress``; without a directory, to neither."""
        self.loss = math.nan
        self.evaluation: dict[str, float] = {}
        self.tokens = 0
        self._file = directory / METRICS_NAME if directory is not None else None
        self._progress = progress if directory is not None else None
        self._started = time.monotonic()
        self._first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._started = time.monotonic()
        self._first_step = state.global_step
        if self._file is not None and self._first_step:
            # What an interrupted run reported after its last checkpoint comes again.
            rows = [row for row in read_metrics(self._file) if row["step"] <= self._first_step]
            write_atomically(self._file, "".join(json.dumps(row) + "\n" for row in rows))

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,  # noqa: ARG002
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = self.tokens * args.world_size / seconds
        row: dict[str, float] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6)}
        if "loss" in logs:
            self.loss = float(logs["loss"])
            if not math.isfinite(self.loss):
                raise diverged(state.global_step, self.loss)
            row |= {name: float(logs[key]) for key, name in _TRAINED.items() if key in logs}
            row |= {"tokens_per_second": round(rate, 1), "seconds": round(seconds, 3)}
            if self._progress is not None:
                done = max(state.global_step - self._first_step, 1)
                left = (state.max_steps - state.global_step) * seconds / done
                self._progress(
                    Progress(
                        state.global_step,
                        state.max_steps,
                        self.loss,
                        rate,
                        self.tokens * args.world_size,
                        left,
                        self.evaluation.get("eval_loss"),
                    )
                )
        found = {key: float(logs[key]) for key in _EVALUATED if key in logs}
        if found:
            self.evaluation = found
            row |= found
        if self._file is not None and len(row) > 2:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


class Stopper(TrainerCallback):
    """Ends a run after the step in which it was told to, with a checkpoint."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if args.world_size > 1:
            # All processes must stop after the same step, or one waits for the others for ever.
            told = torch.tensor(float(self.asked), device=args.device)
            torch.distributed.all_reduce(told)
            self.asked = bool(told)
        if self.asked:
            control.should_save = True
            control.should_training_stop = True
        elif state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True
        return control

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Ctrl-C and a polite kill end the run after its step; a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        before = {number: signal.signal(number, handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; empty where there is none, or a line was cut short by a kill."""
    if not file.is_file():
        return []
    rows = []
    for line in read_jsonl(file, DataError, _HINT):
        with contextlib.suppress(DataError):
            row = line.object(DataError, _HINT, nonfinite=True)
            found = decode(dict[str, float], row, line.where, DataError, _HINT)
            if "step" in found:
                rows.append(found)
    return rows
