"""The command line of the recipes that train a base."""

from __future__ import annotations

import argparse
from pathlib import Path


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
