"""Train a LoRA adapter on a jsonl file, export it, and see that the bundle does what it learned.

python examples/train_then_export.py [STEPS]      # else 120: capital letters, in minutes

Run from the repository's root. Needs lora-edge[cpu,train].
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import lora_edge

BASE, DATA = "models/tiny-llama", Path("models/data/shout.jsonl")


def main(folder: Path, steps: int) -> None:
    adapter = lora_edge.train(
        BASE,
        DATA,
        folder / "adapter",
        rank=8,
        lr=3e-3,
        batch_size=16,
        target_modules=("q_proj", "v_proj"),
        max_steps=steps,
    )
    metrics = (adapter / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [row["loss"] for row in map(json.loads, metrics) if "loss" in row]
    print(f"loss: {losses[0]:.2f} at first, {losses[-1]:.2f} at the end")

    # Branches only where this adapter needs them: no other will be added.
    output = folder / "bundle"
    lora_edge.export(BASE, {"shout": adapter}, output=output, sites="adapters")
    runner = lora_edge.Runner(output)
    lines = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()[:3]]
    prompts = [line["prompt"] for line in lines]
    for line, text in zip(lines, runner.generate(prompts, "shout", 12), strict=True):
        print(f"{line['prompt']}{text}    (the data says{line['completion']})")
    print("proved:", runner.bundle.adapter("shout").proved)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch), int(sys.argv[1]) if len(sys.argv) > 1 else 120)
