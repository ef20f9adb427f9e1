"""Accuracy of each classifier on its held-out lines, with PyTorch.

Beside it: the base with an untrained head, and the adapter's head without its low-rank parts.
``python models/recipes/evaluate_classes.py [ADAPTERS]``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from lora_edge.base.checkpoint import resolve_base
from lora_edge.parity.plan.states import BASE, only
from lora_edge.parity.reference import Reference
from lora_edge.tasks.task import Task

MODELS = Path(__file__).resolve().parents[1]


def main() -> None:
    adapters = Path(sys.argv[1]) if len(sys.argv) > 1 else MODELS / "classifiers"
    base = resolve_base(MODELS / "tiny-bert")
    tokenizer = AutoTokenizer.from_pretrained(base.directory)
    print("| classifier | labels | base, fresh head | trained head alone | adapter | logit noise |")
    print("|---|---|---:|---:|---:|---:|")
    for folder in sorted(path for path in adapters.iterdir() if path.is_dir()):
        labels = json.loads((folder / "training.json").read_text(encoding="utf-8"))["labels"]
        data = MODELS / "data" / "classes" / f"{folder.name}.jsonl"
        lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
        wanted = [labels.index(line["label"]) for line in lines]
        rows = [dict(tokenizer(line["text"], return_tensors="np")) for line in lines]
        rows = [{name: array[0] for name, array in row.items()} for row in rows]
        reference = Reference(base, Task("text-classification", len(labels)))
        reference.attach(folder.name, folder, len(labels))
        off, on = [BASE] * len(rows), [only(folder.name)] * len(rows)
        outputs = [
            reference.outputs(rows, off),
            reference.outputs(rows, on, low_rank=False),
            reference.outputs(rows, on),
        ]
        with reference.wide():
            wide = reference.outputs(rows, on)
        noise = max(np.abs(a - b).max() for a, b in zip(outputs[-1], wide, strict=True))
        shares = [
            np.mean([o.argmax() == w for o, w in zip(x, wanted, strict=True)]) for x in outputs
        ]
        figures = " | ".join(f"{share:.1%}" for share in shares)
        print(f"| {folder.name} | {', '.join(labels)} | {figures} | {noise:.1e} |", flush=True)


if __name__ == "__main__":
    main()
