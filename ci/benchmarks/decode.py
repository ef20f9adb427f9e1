"""`ci/bench decode`: seconds for each new token, ours beside onnxruntime-genai's graph and PyTorch.

The contestants take turns token by token in shuffled order, in several fresh processes that make
them in shuffled order: the machine's speed drifts, and every session has a bias of its own, which
is why the reference is entered twice. Its ratio to itself is what the comparison can resolve.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import geometric_mean, median

import numpy as np
from contestants import (
    AGAIN,
    EAGER,
    MERGED,
    OFF,
    OFF_PINNED,
    ON,
    ON_PINNED,
    PEFT,
    REFERENCE,
)
from measure import PROMPT, measure
from prepare import TINY, Shape, genai_installed, prepare

Runs = Sequence[Mapping[str, float]]
"""For each process, the median seconds of a step by contestant."""

TARGETS = (
    (MERGED, REFERENCE, 0.95),
    (ON, MERGED, 0.90),
    (OFF, MERGED, 0.98),
    (ON_PINNED, MERGED, 0.98),
    (OFF_PINNED, MERGED, 0.98),
    (ON, PEFT, 3.0),
)
_ROWS = (REFERENCE, AGAIN, MERGED, ON, OFF, ON_PINNED, OFF_PINNED, PEFT, EAGER)


@dataclass(frozen=True)
class Ratio:
    """A ratio of speeds: in each process a ratio of medians, over the processes their mean.

    Attributes:
        value: geometric mean over the processes.
        error: two standard errors of it, as a share; None for one process.
        lowest: the smallest of the processes.
        highest: the largest.
    """

    value: float
    error: float | None
    lowest: float
    highest: float

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error * self.value:.3f}"
        return f"{self.value:.3f}{error:8}  [{self.lowest:.3f}, {self.highest:.3f}]"


def ratio(runs: Runs, name: str, other: str) -> Ratio:
    """Speed of ``name`` over that of ``other``.

    Args:
        runs: the processes.
        name: a contestant.
        other: another; the reference stands for both of its entries.
    """
    values = []
    for run in runs:
        entries = [run[other]]
        if other == REFERENCE and name != AGAIN:
            entries.append(run[AGAIN])
        values.append(geometric_mean(entries) / run[name])
    error = 2 * float(np.std(np.log(values), ddof=1)) / len(values) ** 0.5 if values[1:] else None
    return Ratio(geometric_mean(values), error, min(values), max(values))


def verdict(reached: Ratio, target: float) -> str:
    """Whether a target is reached, as far as the spread lets one say."""
    error = reached.error or 0.0
    if reached.value >= target:
        return "reached" if reached.value * (1 - error) >= target else "reached, within the error"
    return "missed" if reached.value * (1 + error) < target else "missed, within the error"


def table(runs: Runs) -> str:
    """All results, for people."""
    names = [name for name in _ROWS if name in runs[0]]
    first = names[0]
    lines = [f"{'':16}{'tokens/s':>10}   speed / {first}: mean ± 2 s.e.  [lowest, highest]"]
    for name in names:
        speed = 1 / median(run[name] for run in runs)
        compared = "1" if name == first else str(ratio(runs, name, first))
        lines.append(f"{name:16}{speed:10.1f}   {compared}")
    lines.append("")
    for name, other, target in TARGETS:
        if other in runs[0]:
            reached = ratio(runs, name, other)
            what = f"{name} / {other} >= {target:g}"
            lines.append(f"{what:36}{reached}  {verdict(reached, target)}")
    return "\n".join(lines)


def report(runs: Runs, settings: Mapping[str, object]) -> dict[str, object]:
    """All results, for machines."""
    names = [name for name in _ROWS if name in runs[0]]
    packages = ["torch", "transformers", "peft", "onnxruntime"]
    return {
        "settings": dict(settings),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {package: version(package) for package in packages},
        "median_seconds": [dict(run) for run in runs],
        "speed": {name: asdict(ratio(runs, name, names[0])) for name in names[1:]},
        "targets": [
            {"name": name, "over": other, "target": target, **asdict(ratio(runs, name, other))}
            for name, other, target in TARGETS
            if other in runs[0]
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="ci/bench decode", description=__doc__)
    parser.add_argument("--processes", type=int, default=8, help="fresh processes (default 8)")
    parser.add_argument(
        "--steps", type=int, default=32, help="turns in each, of two tokens (default 32)"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="with one thread: the time that it ran, for a machine that others use too",
    )
    parser.add_argument("--tiny", action="store_true", help="a toy shape, to try the script")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    chosen = parser.parse_args()
    if chosen.cpu_time and chosen.threads != 1:
        parser.error("--cpu-time is the time of one thread: give --threads 1")
    shape = TINY if chosen.tiny else Shape()
    settings = {
        "shape": asdict(shape),
        "prompt": PROMPT,
        "processes": chosen.processes,
        "steps": chosen.steps,
        "threads": chosen.threads,
        "clock": "cpu" if chosen.cpu_time else "wall",
    }
    with tempfile.TemporaryDirectory() as folder:
        _say("making the model, the adapter and the graphs")
        if not genai_installed():
            _say("onnxruntime-genai is not installed: its graph does not take part")
        graphs = prepare(Path(folder), shape)
        run = partial(
            measure,
            graphs,
            steps=chosen.steps,
            threads=chosen.threads,
            cpu_time=chosen.cpu_time,
        )
        spawn = multiprocessing.get_context("spawn")
        runs = []
        for seed in range(chosen.processes):
            with ProcessPoolExecutor(1, spawn) as fresh:
                seconds = fresh.submit(run, seed).result()
            runs.append({name: median(values) for name, values in seconds.items()})
            _say(f"process {len(runs)} of {chosen.processes} done")
    print(f"{processor()}, threads: {chosen.threads}, clock: {settings['clock']}")
    print(table(runs))
    if chosen.json:
        text = json.dumps(report(runs, settings), indent=2)
        chosen.json.write_text(text + "\n", encoding="utf-8")


def processor() -> str:
    """What the machine calls its processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
