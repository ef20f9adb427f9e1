"""Exact match of the base and each adapter, with PyTorch: ``python models/recipes/evaluate.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

MODELS = Path(__file__).resolve().parents[1]
BATCH = 150


def completions(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Greedy answers, up to the end token."""
    answers: list[str] = []
    for start in range(0, len(prompts), BATCH):
        rows = tokenizer(prompts[start : start + BATCH], return_tensors="pt", padding=True)
        out = model.generate(**rows, max_new_tokens=24, do_sample=False)
        new = out[:, rows["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(new, skip_special_tokens=True)
    return answers


def exact_match(model: Any, tokenizer: Any, data: Path) -> float:
    """Share of the lines whose completion is met exactly."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    answers = completions(model, tokenizer, [row["prompt"] for row in rows])
    hits = [a == row["completion"] for a, row in zip(answers, rows, strict=True)]
    return sum(hits) / len(rows)


def load(adapter: Path | None) -> tuple[Any, Any]:
    """The base, alone or with an adapter, and its tokenizer."""
    base = MODELS / "tiny-llama"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    return model, AutoTokenizer.from_pretrained(base, padding_side="left")


def main() -> None:
    adapters = Path(sys.argv[1]) if len(sys.argv) > 1 else MODELS / "adapters"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tasks = sorted((MODELS / "data").glob("*.jsonl"))
    print("| model | " + " | ".join(task.stem for task in tasks) + " |")
    print("|---|" + "---:|" * len(tasks))
    for name in ("base", *sorted(path.name for path in adapters.iterdir())):
        model, tokenizer = load(None if name == "base" else adapters / name)
        scores = [exact_match(model, tokenizer, task) for task in tasks]
        print(f"| {name} | " + " | ".join(f"{score:.1%}" for score in scores) + " |", flush=True)


if __name__ == "__main__":
    main()
