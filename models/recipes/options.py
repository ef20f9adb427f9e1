"""The command line of the recipes that train a base, and what it means for the trainer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import TrainingArguments


def recipe_options(
    description: str | None, model: str, work: str, *, steps: int, batch_size: int, lr: float
) -> argparse.Namespace:
    """What is given, else these defaults; ``model`` is the folder beside the recipes."""
    parser = argparse.ArgumentParser(description=description)
    models = Path(__file__).resolve().parents[1]
    parser.add_argument("directory", nargs="?", type=Path, default=models / model)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path(work))
    return parser.parse_args()


def training_arguments(options: argparse.Namespace, **own: Any) -> TrainingArguments:
    """Those of ``transformers.Trainer`` on the CPU; ``own`` is what a recipe adds."""
    return TrainingArguments(
        output_dir=str(options.work),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        adam_beta2=0.98,
        max_grad_norm=1.0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=options.seed,
        **own,
    )
