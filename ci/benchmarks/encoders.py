"""What few bits do to an encoder's speed: a BERT of base size, random weights, adapter on.

    .venv/bin/python ci/benchmarks/encoders.py [--rounds 3] [--turns 12] [--threads 2]
    .venv-optimum/bin/python ci/benchmarks/encoders.py --model t5

The T5 has the shape of t5-small: its encoder reads a row, and its decoder as many tokens at once.
Each round is a process of its own; contestants take turns in shuffled order; float32 takes part
twice. Prints seconds and ratios of float32's time to theirs, with their 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from made import export_unproved

from lora_edge.bench.ratios import ratio, resolution
from lora_edge.runtime import Runner

FORMS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "int8": {"precision": "int8"},
    "int8 per channel": {"precision": "int8", "per_channel": True},
    "int4": {"precision": "int4"},
}
AGAIN = "fp32 again"
LENGTHS = {"1 row of 16 tokens": (1, 16), "1 row of 128": (1, 128), "8 rows of 128": (8, 128)}


def bert() -> tuple[Any, dict[str, Any]]:
    """A model, and what PEFT adapts of it."""
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(num_labels=2, pad_token_id=0))
    return model, {
        "target_modules": ["query", "key", "value", "dense"], "task_type": "SEQ_CLS",
        "exclude_modules": r".*pooler.*",
    }  # fmt: skip


def t5() -> tuple[Any, dict[str, Any]]:
    """A model, and what PEFT adapts of it."""
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0))
    layers = ["q", "k", "v", "o", "wi", "wo"]
    return model, {"target_modules": layers, "task_type": "SEQ_2_SEQ_LM"}


MODELS: dict[str, tuple[Callable[[], tuple[Any, dict[str, Any]]], list[str], dict[str, Any]]] = {
    "bert": (bert, list(FORMS), {}),
    "t5": (t5, ["fp32", "int8", "int4"], {"backend": "optimum"}),
}
"""Name -> what makes it, its forms, and options of its export."""


def make(folder: Path, name: str) -> None:
    """Write a base, an adapter and a bundle of each form."""
    import peft
    import torch

    build, forms, options = MODELS[name]
    torch.manual_seed(0)
    base, settings = build()
    base.eval().save_pretrained(folder / "base")
    config = peft.LoraConfig(r=16, init_lora_weights=False, **settings)
    peft.get_peft_model(base, config).save_pretrained(folder / "a")
    for form in forms:
        own = {**options, **FORMS[form]}
        export_unproved(folder / "base", {"a": folder / "a"}, folder / form, **own)


def asked(runner: Runner, ids: list[list[int]]) -> object:
    """What is measured."""
    if len(runner.bundle.manifest.parts) > 1:
        return runner.seq2seq_logits(ids, ids, "a")
    return runner.logits(ids, adapter="a")


def measure(
    folder: Path, forms: list[str], turns: int, threads: int
) -> dict[str, dict[str, float]]:
    """Median seconds: length -> contestant."""
    sources = {**{name: folder / name for name in forms}, AGAIN: folder / "fp32"}
    runners = {name: Runner(path, threads=threads) for name, path in sources.items()}
    found: dict[str, dict[str, float]] = {}
    for length, (rows, tokens) in LENGTHS.items():
        ids = [[5 + (row * tokens + x) % 20000 for x in range(tokens)] for row in range(rows)]
        seconds: dict[str, list[float]] = {name: [] for name in runners}
        for turn in range(turns + 1):
            for name in random.sample(list(runners), len(runners)):
                begun = time.perf_counter()
                asked(runners[name], ids)
                if turn:  # the first wakes it
                    seconds[name].append(time.perf_counter() - begun)
        found[length] = {name: statistics.median(own) for name, own in seconds.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=list(MODELS), default="bert")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    _, forms, _ = MODELS[given.model]
    if given.measure:
        print(json.dumps(measure(given.measure, forms, given.turns, given.threads)))
        return
    with tempfile.TemporaryDirectory() as work:
        make(Path(work), given.model)
        for name in forms:
            size = sum(x.stat().st_size for x in (Path(work) / name / "onnx").iterdir())
            print(f"{name:<18} {size:>12,} bytes of graphs and weights")
        command = [sys.executable, __file__, "--measure", work, "--turns", str(given.turns)]
        command += ["--threads", str(given.threads), "--model", given.model]
        rounds = [json.loads(subprocess.check_output(command)) for _ in range(given.rounds)]
    for length in LENGTHS:
        own = {name: [one[length][name] for one in rounds] for name in (*forms, AGAIN)}
        told = resolution(ratio(own["fp32"], own[AGAIN]))
        known = "anything" if told is None else f"{told:.1%}"
        print(f"{length}: differences below {known} are not resolved")
        for name in forms:
            faster = ratio(own["fp32"], own[name])
            ends = "" if faster.low is None else f" ({faster.low:.2f} to {faster.high:.2f})"
            print(f"  {name:<18} {statistics.median(own[name]):.4f} s  {faster.value:.2f}{ends}")


if __name__ == "__main__":
    main()
