"""transformers' Trainer with the loss on targets only, and what else differs from its own.

Knows tensors, batches and settings; knows nothing of data files or of the adapter's files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from lora_edge.training.batches import LengthGroups, size_of
from lora_edge.training.callbacks import Reporter, diverged
from lora_edge.training.checkpoints import rotate, seal
from lora_edge.training.head import TargetHead, predicting, target_logits
from lora_edge.training.settings import Settings
from lora_edge.training.sharding import shard_on_cpu, sharded


class TargetTrainer(Trainer):
    """The Trainer, with the loss on targets, LoRA+, groups of like length, exact evaluation."""

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        settings: Settings,
        head: TargetHead | None,
        reporter: Reporter,
        **options: Any,
    ) -> None:
        # A loss function makes Trainer count the targets of all accumulated batches and processes.
        counted = mean_over_all if head is not None or not settings.full_logits else None
        super().__init__(model=model, args=args, compute_loss_func=counted, **options)
        self._settings = settings
        self._head = head
        self._reporter = reporter

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        shard_on_cpu(self)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if sharded():
            # Else processes may differ on whether the best checkpoint is there, and wait for ever.
            folder.mkdir(parents=True, exist_ok=True)
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes files of its own
        if self.args.should_save:
            seal(folder)
            rotate(folder, self.state.best_model_checkpoint)  # after, not before as Trainer does

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if not self._settings.group_by_length:
            return super()._get_train_sampler(*args, **kwargs)
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps
        lengths = [size_of(example) for example in self.train_dataset]
        return LengthGroups(lengths, together * self.args.world_size, self._settings.seed)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        ratio = self._settings.loraplus_ratio
        if ratio == 1.0:
            return super().create_optimizer(*args, **kwargs)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer: Any = create_loraplus_optimizer(
            self.model,
            kind,
            loraplus_lr_ratio=ratio,
            loraplus_weight_decay=self.args.weight_decay,
            **options,
        )
        return self.optimizer

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._reporter.tokens += int(inputs.pop("tokens"))
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise diverged(self.state.global_step + 1, float(loss))
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if self._head is None or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")
        logits, targets = target_logits(model, inputs, labels, self._head)
        loss = cross_entropy(logits, targets, reduction="sum")
        if num_items_in_batch is None:
            return loss / len(targets)
        # Gradients are averaged over the processes afterwards.
        return loss / num_items_in_batch * self.accelerator.num_processes

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,  # noqa: ARG002
        ignore_keys: Any = None,  # noqa: ARG002
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """For each example the sum of its losses, the count of its targets, and of those met."""
        inputs = self._prepare_inputs({k: v for k, v in inputs.items() if k != "tokens"})
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            if labels.ndim == 1:
                logits, targets = model(**inputs).logits.float(), labels
                rows = torch.arange(len(labels), device=labels.device)
            else:
                logits, targets = target_logits(model, inputs, labels, self._head)
                rows = predicting(labels).nonzero()[:, 0]
            losses = cross_entropy(logits, targets, reduction="none").double()
        sums = torch.zeros(len(labels), 3, dtype=torch.float64, device=labels.device)
        met = (logits.argmax(-1) == targets).double()
        sums.index_add_(0, rows, torch.stack([losses, torch.ones_like(losses), met], dim=1))
        return None, sums, torch.zeros(len(labels), device=labels.device)


def mean_over_all(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None
) -> torch.Tensor:
    """Mean loss over the targets of all accumulated batches, the head computed everywhere."""
    logits, targets = outputs.logits, labels
    if labels.ndim == 2:
        keep = predicting(labels)
        logits, targets = logits[keep], labels[:, 1:][keep[:, :-1]]
    loss = cross_entropy(logits.float(), targets, reduction="sum")
    return loss / (len(targets) if num_items_in_batch is None else num_items_in_batch)
