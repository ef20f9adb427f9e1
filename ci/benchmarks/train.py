"""`ci/bench train`: tokens/s and memory of the trainer beside plain transformers.Trainer + peft.

Each contestant runs in a fresh process of one thread, in rounds of shuffled order, on the same
examples; the reference is entered twice. Its ratio to itself is what the comparison can resolve.
Those that train the same adapter must end at the same loss, or they do not do the same work.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from shapes import Shape, make_model

from lora_edge.base.checkpoint import resolve_base
from lora_edge.bench.ratios import Ratio, reached, resolution
from lora_edge.bench.ratios import ratio as ratio_of
from lora_edge.reports.bench import spread
from lora_edge.training import Settings, train
from lora_edge.training.callbacks import Progress
from lora_edge.training.data import read_data
from lora_edge.training.model import load_model, load_tokenizer
from lora_edge.training.tokens import tokenize

REFERENCE, AGAIN, FULL = "Trainer + peft", "the same again", "Trainer, all weights"
OURS: Mapping[str, Mapping[str, Any]] = {
    "lora-edge": {},
    "lora-edge, full logits": {"full_logits": True},
    "lora-edge, grouped": {"group_by_length": True},
    "lora-edge, packed": {"packing": True, "batch_size": 2},
}
SAME_LOSS = (REFERENCE, AGAIN, "lora-edge", "lora-edge, full logits")
TARGET = 1.0
_WARM_UP = 3  # steps
_RANK, _ALPHA, _LR, _BATCH = 16, 32, 1e-4, 8
_WORDS = ("river", "stone", "cloud", "apple", "green", "horse", "paper", "light", "mouse")


@dataclass(frozen=True)
class Run:
    """One process.

    Attributes:
        seconds: of a step, the median.
        tokens_per_second: over all steps after the warm-up, padding not counted.
        peak_bytes: resident memory at its peak, less what the libraries took before the model.
        loss: of the last step.
        trainable: parameters.
        written_bytes: size of the weights' file that was saved; 0 where none was.
    """

    seconds: float
    tokens_per_second: float
    peak_bytes: int
    loss: float
    trainable: int
    written_bytes: int


def make_base(folder: Path) -> Path:
    """A Llama of 17.5 million random parameters, a seventh of them in the output head."""
    sizes = {"layers": 12, "hidden": 320, "intermediate": 864, "heads": 5, "kv_heads": 5}
    base = folder / "base"
    make_model(base, Shape(**sizes, vocabulary=8192, positions=512))
    return base


def make_data(folder: Path) -> Path:
    """Prompts of 20 to 200 bytes with completions of 10 to 100."""
    order = random.Random(0)

    def text(least: int, most: int) -> str:
        size, made = order.randint(least, most), ""
        while len(made) < size:
            made += f" {order.choice(_WORDS)}"
        return made

    path = folder / "data.jsonl"
    rows = [{"prompt": text(20, 200), "completion": text(10, 100)} for _ in range(256)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def measure(name: str, base: Path, data: Path, steps: int, wall: bool) -> Run:
    """Train as one contestant does, in this process."""
    import torch

    # peft 0.21 asks transformers 5 for a name that is about to go.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    torch.set_num_threads(1)
    clock = time.perf_counter if wall else time.process_time
    if name in OURS:
        return _ours(base, data, steps, clock, OURS[name])
    return _plain(base, data, steps, clock, full=name == FULL)


def _ours(
    base: Path, data: Path, steps: int, clock: Callable[[], float], options: Mapping[str, Any]
) -> Run:
    import accelerate  # noqa: F401
    import peft  # noqa: F401

    import lora_edge.training.prepare  # noqa: F401

    settings = Settings(
        **{
            **_common(steps),
            "rank": _RANK,
            "alpha": _ALPHA,
            "batch_size": _BATCH,
            "max_length": 512,
            "device": "cpu",
            **options,
        }
    )
    before = _resident()
    marks: list[tuple[float, int, float]] = []

    def mark(at: Progress) -> None:
        marks.append((clock(), at.tokens, at.loss))

    with tempfile.TemporaryDirectory() as folder:
        made = train(base, data, Path(folder) / "a", settings=settings, progress=mark)
        record = json.loads((made / "training.json").read_text(encoding="utf-8"))
        size = (made / "adapter_model.safetensors").stat().st_size
    return _run(marks, before, record["result"]["trainable_parameters"], size)


def _plain(base: Path, data: Path, steps: int, clock: Callable[[], float], *, full: bool) -> Run:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        DataCollatorForSeq2Seq,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    found = resolve_base(base)
    tokenizer = load_tokenizer(found)
    examples = tokenize(read_data(data).rows, tokenizer, 512)
    rows = [{"input_ids": list(e.input_ids), "labels": list(e.labels)} for e in examples]
    before = _resident()
    model = load_model(found)
    torch.manual_seed(0)
    if not full:
        config = LoraConfig(
            task_type="CAUSAL_LM", r=_RANK, lora_alpha=_ALPHA, target_modules="all-linear"
        )
        model = get_peft_model(model, config)
    pad = DataCollatorForSeq2Seq(tokenizer)
    counts: list[int] = []

    def collate(batch: list[dict[str, list[int]]]) -> Any:
        counts.append(sum(len(row["input_ids"]) for row in batch))
        return pad(batch)

    marks: list[tuple[float, int, float]] = []

    class Marks(TrainerCallback):
        def on_log(self, *_: Any, **given: Any) -> None:
            logs, state = given["logs"], trainer.state
            if "loss" in logs:
                marks.append((clock(), sum(counts[: state.global_step]), logs["loss"]))

    common = _common(steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=common["max_steps"],
                learning_rate=common["lr"],
                warmup_steps=0,
                seed=common["seed"],
                per_device_train_batch_size=_BATCH,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=rows,
            data_collator=collate,
            callbacks=[Marks()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return _run(marks, before, sum(p.numel() for p in model.parameters() if p.requires_grad), 0)


def _common(steps: int) -> dict[str, Any]:
    return {"max_steps": steps, "lr": _LR, "warmup": 0.0, "seed": 0}


def _run(marks: Sequence[tuple[float, int, float]], before: int, trainable: int, size: int) -> Run:
    times, tokens, losses = zip(*marks, strict=True)
    kept = range(_WARM_UP, len(times))
    return Run(
        median(times[i] - times[i - 1] for i in kept),
        (tokens[-1] - tokens[_WARM_UP - 1]) / (times[-1] - times[_WARM_UP - 1]),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
        losses[-1],
        trainable,
        size,
    )


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


Rounds = Sequence[Mapping[str, Run]]


def ratio(rounds: Rounds, name: str) -> Ratio:
    """Tokens/s of a contestant over the reference's: of both of its entries, but for the second."""
    own, others = [], []
    for one in rounds:
        entries = [one[REFERENCE].tokens_per_second]
        if name != AGAIN:
            entries.append(one[AGAIN].tokens_per_second)
        own.append(one[name].tokens_per_second)
        others.append(geometric_mean(entries))
    return ratio_of(own, others)


def table(rounds: Rounds) -> str:
    """All results, for people."""
    lines = [
        f"{'':24}{'tokens/s':>10}{'s/step':>9}{'memory':>12}{'trained':>13}"
        f"   tokens/s / {REFERENCE}: mean (95 %)"
    ]
    for name in rounds[0]:
        runs = [one[name] for one in rounds]
        compared = "1" if name == REFERENCE else spread(asdict(ratio(rounds, name)))
        lines.append(
            f"{name:24}{median(r.tokens_per_second for r in runs):10.0f}"
            f"{median(r.seconds for r in runs):9.3f}"
            f"{median(r.peak_bytes for r in runs) / (1 << 20):8.0f} MiB"
            f"{runs[0].trainable:13,}   {compared}"
        )
    own, resolved = ratio(rounds, "lora-edge"), resolution(ratio(rounds, AGAIN))
    word = reached(own, resolved, TARGET, least=True)
    lines += ["", f"lora-edge / {REFERENCE} >= {TARGET:g}: {spread(asdict(own))}  {word}"]
    return "\n".join(lines)


def check(one: Mapping[str, Run]) -> None:
    """Those that train the same adapter end at the same loss.

    Raises:
        RuntimeError: one does not.
    """
    wanted = one[REFERENCE].loss
    for name in SAME_LOSS:
        if abs(one[name].loss - wanted) > 0.02 * wanted:
            raise RuntimeError(f"{name} ends at loss {one[name].loss}, {REFERENCE} at {wanted}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="ci/bench train", description=__doc__)
    parser.add_argument("--processes", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--steps", type=int, default=16, help="in each process (default 16)")
    parser.add_argument("--base", type=Path, help="another base, such as models/tiny-llama")
    parser.add_argument("--wall", action="store_true", help="not the process's CPU time")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    chosen = parser.parse_args()
    if chosen.steps <= _WARM_UP + 1:
        parser.error(f"--steps must be above {_WARM_UP + 1}")
    spawn = multiprocessing.get_context("spawn")
    rounds: list[dict[str, Run]] = []
    names = [REFERENCE, AGAIN, *OURS, FULL]
    with tempfile.TemporaryDirectory() as folder:
        base = chosen.base or make_base(Path(folder))
        data = make_data(Path(folder))
        for seed in range(chosen.processes):
            order = list(names)
            random.Random(seed).shuffle(order)
            found: dict[str, Run] = {}
            for name in order:
                with ProcessPoolExecutor(1, spawn) as fresh:
                    task = fresh.submit(measure, name, base, data, chosen.steps, chosen.wall)
                    found[name] = task.result()
            rounds.append({name: found[name] for name in names})
            check(rounds[-1])
            print(f"round {seed + 1} of {chosen.processes} done", file=sys.stderr, flush=True)
        size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    adapter = rounds[0]["lora-edge"].written_bytes
    print(f"one thread, clock: {'wall' if chosen.wall else 'cpu'}")
    print(table(rounds))
    print(f"adapter {adapter:,} bytes, base {size:,} bytes: {adapter / size:.1%}")
    if chosen.json:
        results = [{name: asdict(run) for name, run in one.items()} for one in rounds]
        chosen.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
