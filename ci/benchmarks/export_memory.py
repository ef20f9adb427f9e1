"""What an export with its proof takes: peak memory, processor time, bytes written.

    .venv/bin/python ci/benchmarks/export_memory.py [--shapes 135m,0.5b,1b] [--precision fp32]

Random weights of real sizes, one adapter on all linear layers. Each export is a process of its own
on one processor. Peak memory is the largest resident size, mapped files included; *private* is the
part that no file holds. Imports are measured in the same process, before the export begins.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from prepare import Shape, copy_tokenizer

SHAPES = {
    "tiny": Shape(layers=2, hidden=64, intermediate=96, heads=2, kv_heads=1, vocabulary=320),
    "135m": Shape(),
    "0.5b": Shape(24, 896, 4864, 14, 2, 151936),
    "1b": Shape(16, 2048, 8192, 32, 8, 128256),
    "3b": Shape(28, 3072, 8192, 24, 8, 128256),
}
_RANK = 16

_EXPORT = """
import json, os, resource, sys, threading, time
from pathlib import Path
folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
import onnx, onnxruntime, peft, torch, transformers
from transformers import LlamaForCausalLM
import lora_edge

def resident():
    text = Path("/proc/self/status").read_text()
    fields = dict(line.split(":\\t", 1) for line in text.splitlines() if ":\\t" in line)
    return [int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssFile")]

imports = sum(resident())
stage, stages, ended = "", {}, threading.Event()

def watch():
    while not ended.wait(0.02):
        private, mapped = resident()
        peak = stages.setdefault(stage, [0, 0, 0.0])
        peak[0], peak[1] = max(peak[0], private + mapped), max(peak[1], private)

def say(line):
    global stage
    now = time.process_time()
    stages.setdefault(stage, [0, 0, 0.0])[2] += now - say.since
    stage, say.since = line.partition(" (")[0], now

say.since = time.process_time()
watcher = threading.Thread(target=watch)
watcher.start()
begun = time.process_time()
lora_edge.export(folder / "base", {"a": folder / "adapter"}, output=folder / "out", progress=say,
                 force=True, **options)
say("")
ended.set()
watcher.join()
io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
print(json.dumps({
    "imports": imports,
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    "private": max(private for _, private, _ in stages.values()),
    "seconds": time.process_time() - begun,
    "written": int(io["wchar"]),
    "stages": {name: value for name, value in stages.items() if name},
}))
"""


def make(folder: Path, shape: Shape, dtype: str) -> int:
    """Write a base and an adapter; the base's size as float32, in bytes."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.positions,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder / "base")
    copy_tokenizer(folder / "base")
    numbers = sum(x.numel() for x in model.parameters())
    config = LoraConfig(
        r=_RANK,
        lora_alpha=_RANK,
        target_modules="all-linear",
        init_lora_weights=False,  # B is random too
        task_type="CAUSAL_LM",
    )
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    return 4 * numbers


def measure(folder: Path, precision: str) -> dict[str, Any]:
    """Export in a process of its own, on one processor."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["ORT_DISABLE_TELEMETRY"] = "1"
    options = json.dumps({"precision": precision})
    command = [sys.executable, "-W", "ignore", "-c", _EXPORT, str(folder), options]
    one = sorted(os.sched_getaffinity(0))[:1]
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, one),
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure each shape and print a table, then JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", default="135m", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "int8", "int4"))
    parser.add_argument("--dtype", default="float32", help="of the checkpoint: bfloat16, ...")
    parser.add_argument("--folder", type=Path, help="where to work, and to leave what is made")
    given = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    print("| shape | peak / model | without imports | private / model | CPU s | written / model |")
    print("|---|---|---|---|---|---|")
    for name in given.shapes.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            folder = (given.folder or Path(scratch)) / f"{name}-{given.dtype}"
            sizes = folder / "size.json"
            if not sizes.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                make_here = [sys.executable, __file__, "--make", name, given.dtype, str(folder)]
                subprocess.run(make_here, check=True, stdout=subprocess.DEVNULL)
            size = json.loads(sizes.read_text())
            own = found[name] = {"model": size, **measure(folder, given.precision)}
            print(
                f"| {name} | {own['peak'] / size:.2f} "
                f"| {(own['peak'] - own['imports']) / size:.2f} | {own['private'] / size:.2f} "
                f"| {own['seconds']:.0f} | {own['written'] / size:.2f} |",
                flush=True,
            )
    print(json.dumps({"precision": given.precision, "dtype": given.dtype, "shapes": found}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        _, _, shape, dtype, where = sys.argv
        size = make(Path(where), SHAPES[shape], dtype)
        (Path(where) / "size.json").write_text(json.dumps(size))
    else:
        main()
