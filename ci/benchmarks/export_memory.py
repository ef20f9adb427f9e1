"""What an export with its proof takes: peak memory, processor time, bytes written.

    .venv/bin/python ci/benchmarks/export_memory.py [--shapes 135M,1B] [--precision fp32]
    .venv/bin/python ci/benchmarks/export_memory.py --shapes 3B --precision int4
    .venv/bin/python ci/benchmarks/export_memory.py --shapes 8B --layers 8 --precision int4 \
        --low-memory

Random weights of real sizes, one adapter on all linear layers. Each export is a process of its own
on one processor. Peak memory is the largest resident size, mapped files included; *private* is the
part that no file holds. Both are beside the bytes of the model in float32, whatever the checkpoint
has. Imports are measured in the same process, before the export begins. A second table has the
stages. Peaks do not depend on what else runs; seconds do. A shape with fewer ``--layers`` is proved
on as many prompts as the whole shape is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from made import Made
from shapes import SHAPES

_EXPORT = """
import json, sys, threading, time
from pathlib import Path
base, adapter, output, options = *sys.argv[1:4], json.loads(sys.argv[4])
share = float(sys.argv[5])  # of the shape's numbers
import onnx, onnxruntime, peft, torch, transformers
from transformers import LlamaForCausalLM
import lora_edge
from lora_edge.parity import in_parts

in_parts.VERY_LARGE = int(in_parts.VERY_LARGE * share)

def resident(*names):
    text = Path("/proc/self/status").read_text()
    fields = dict(line.split(":\\t", 1) for line in text.splitlines() if ":\\t" in line)
    return [int(fields[name].split()[0]) << 10 for name in names]

imports = sum(resident("RssAnon", "RssFile"))
stage, stages, ended = "", {}, threading.Event()

def watch():
    while not ended.wait(0.02):
        private, mapped = resident("RssAnon", "RssFile")
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
lora_edge.export(base, {"a": adapter}, output=output, progress=say, **options)
say("")
ended.set()
watcher.join()
io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
print(json.dumps({
    "imports": imports,
    "peak": resident("VmHWM")[0],  # ru_maxrss would count the process that started this one
    "private": max(private for _, private, _ in stages.values()),
    "seconds": time.process_time() - begun,
    "written": int(io["wchar"]),
    "stages": {name: value for name, value in stages.items() if name},
}))
"""


def measure(made: Made, precision: str, *, low_memory: bool) -> dict[str, Any]:
    """Export in a process of its own, on one processor."""
    base, adapter = made.base(), made.adapter(0)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["ORT_DISABLE_TELEMETRY"] = "1"
    options = json.dumps({"precision": precision, "low_memory": low_memory})
    one = sorted(os.sched_getaffinity(0))[:1]
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(base), str(adapter), str(Path(folder) / "bundle")]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _EXPORT, *paths, options, str(made.share)],
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
    parser.add_argument("--shapes", default="135M", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "int8", "int4"))
    parser.add_argument("--dtype", help="of the checkpoint: bfloat16, ... [default: the shape's]")
    parser.add_argument("--layers", type=int, help="[default: the shape's]")
    parser.add_argument("--low-memory", action="store_true")
    parser.add_argument("--folder", type=Path, help="keep models and adapters there")
    given = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    low = ", --low-memory" if given.low_memory else ""
    packages = ", ".join(f"{x} {version(x)}" for x in ("onnxruntime", "torch", "transformers"))
    print(f"{time.strftime('%-d %B %Y')}, {packages}, {given.precision}{low}\n")
    print(
        "| shape | peak, GB | peak / model | without imports | private / model | CPU s "
        "| written / model |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for name in given.shapes.split(","):
            made = Made(given.folder or Path(scratch), name, _say, given.dtype, given.layers)
            own = measure(made, given.precision, low_memory=given.low_memory)
            size = own["model"] = made.base_bytes()
            found[made.name] = own
            print(
                f"| {made.name} | {own['peak'] / 1e9:.2f} | {own['peak'] / size:.2f} "
                f"| {(own['peak'] - own['imports']) / size:.2f} | {own['private'] / size:.2f} "
                f"| {own['seconds']:.0f} | {own['written'] / size:.2f} |",
                flush=True,
            )
    print("\n| shape | stage | peak, GB | private, GB | CPU s |\n|---|---|---|---|---|")
    for name, own in found.items():
        for stage, (peak, private, seconds) in own["stages"].items():
            what = stage.partition("/")[0].partition(",")[0].strip()  # without paths and figures
            print(f"| {name} | {what} | {peak / 1e9:.2f} | {private / 1e9:.2f} | {seconds:.0f} |")
    print()
    print(json.dumps({"precision": given.precision, "dtype": given.dtype, "shapes": found}))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
