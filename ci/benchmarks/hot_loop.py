"""`ci/bench hot_loop`: what lora-edge's own code costs beside the graph's runs.

A switch between resident adapters, the load of an adapter from its file, and Python per token; and
the time to the first token of a prompt whose beginning is kept. One thread, seconds that it ran and
not those that passed, in several fresh processes; figures are ratios to a decode step, to the hash
of the same file, or to the same prompt of which nothing is kept, in the same process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from shapes import SHAPES, Shape, make_adapter, make_model

from lora_edge.bench.results import processor
from lora_edge.bundle.bundle import load_bundle
from lora_edge.exporting.export import export
from lora_edge.runtime import Runner
from lora_edge.runtime.adapters.active import ActiveAdapters
from lora_edge.runtime.resident import SizedCache

PROMPT, LENGTH = 128, 1024
SHARED, OWN = 400, 16  # tokens that prompts begin with, and that each ends with

RATIOS = (
    ("switch / step", "switch", "step", 0.02),
    ("own Python per token / step", "own", "step", None),
    ("cold load / hash of the file alone", "load", "hash", None),
    (f"first token, {SHARED} of {SHARED + OWN} kept", "kept", "whole", None),
)


@dataclass(frozen=True)
class Run:
    """One process: median seconds of each thing, and bytes of the adapter's file."""

    seconds: Mapping[str, float]
    file: int


class _Timed:
    """A session that adds up what its runs took."""

    def __init__(self, session: Any) -> None:
        self._session, self.seconds = session, 0.0

    def io_binding(self) -> Any:
        return self._session.io_binding()

    def run_with_iobinding(self, io: Any) -> None:
        start = time.thread_time()
        self._session.run_with_iobinding(io)
        self.seconds += time.thread_time() - start


def measure(bundle: Path, turns: int) -> Run:
    """Everything once per turn, so that a slow moment is in all figures alike.

    Args:
        bundle: a switchable bundle for text generation with two adapters or more.
        turns: repetitions.
    """
    runner = Runner(bundle, threads=1)
    names = list(runner.adapters)
    first, second = names[:2]
    largest = max(names, key=lambda name: _size(runner, name))
    decoder = runner.decoder
    used = runner.start(first, 1, LENGTH).decoder  # of large bundles a smaller graph's
    timed = used.session = _Timed(used.session)
    prompt = [index % decoder.part.vocab_size for index in range(7, 7 + PROMPT)]
    cold = ActiveAdapters(runner.bundle, runner.session.tensors, SizedCache(0))
    content = runner.bundle.read(runner.bundle.adapter(largest).file)
    keeping = Runner(bundle, threads=1, prefix_bytes=1 << 30)
    figures = ("step", "own", "switch", "load", "hash", "whole", "kept")
    found: dict[str, list[float]] = {name: [] for name in figures}

    def generate(count: int) -> tuple[float, float]:
        """Seconds of a generation, of all of it and of what is not the graph's."""
        timed.seconds = 0.0
        whole = _seconds(lambda: runner.generate_ids([prompt], first, count))
        return whole, whole - timed.seconds

    def switch() -> None:
        names.reverse()
        decoder.start(1, LENGTH, runner.binding(names[0], 1))

    def first_token(one: Runner, turn: int) -> float:
        """Seconds of a prompt that begins as those of all turns and ends as no other."""
        own = [(turn + index) % decoder.part.vocab_size for index in range(OWN)]
        shared = [index % decoder.part.vocab_size for index in range(11, 11 + SHARED)]
        return _seconds(lambda: one.generate_ids([shared + own], first, 1))

    names = [first, second]
    first_token(keeping, turns)
    for _ in range(4):  # both have been used before
        switch()
    for turn in range(turns):
        short, long = generate(1), generate(17)
        found["step"].append((long[0] - short[0]) / 16)
        found["own"].append((long[1] - short[1]) / 16)
        found["switch"].append(_seconds(switch))
        found["load"].append(_seconds(lambda: cold.binding(largest, 1)))
        found["whole"].append(first_token(runner, turn))
        found["kept"].append(first_token(keeping, turn))
        found["hash"].append(_seconds(lambda: hashlib.sha256(content).digest()))
    return Run({name: median(values) for name, values in found.items()}, content.nbytes)


def _size(runner: Runner, name: str) -> int:
    return runner.bundle.manifest.files[runner.bundle.adapter(name).file].bytes


def _seconds(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def report(runs: Sequence[Run], settings: Mapping[str, object]) -> dict[str, Any]:
    """All results."""
    ratios = {}
    for name, over, under, target in RATIOS:
        values = [run.seconds[over] / run.seconds[under] for run in runs]
        ratios[name] = {
            "mean": geometric_mean(values),
            "lowest": min(values),
            "highest": max(values),
            "target": target,
        }
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "settings": dict(settings),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("lora-edge", "onnxruntime", "numpy")},
        "file_bytes": runs[0].file,
        "milliseconds": {
            name: [1e3 * run.seconds[name] for run in runs] for name in runs[0].seconds
        },
        "ratios": ratios,
    }


def table(made: Mapping[str, Any]) -> str:
    """All results, for people."""
    lines = [f"{'':36}{'ms, median':>12}   [lowest, highest]"]
    for name, values in made["milliseconds"].items():
        spread = f"[{min(values):.3f}, {max(values):.3f}]"
        lines.append(f"{name:36}{median(values):12.3f}   {spread}")
    lines.append(f"{'':36}{'ratio, mean':>12}")
    for name, ratio in made["ratios"].items():
        spread = f"[{ratio['lowest']:.4f}, {ratio['highest']:.4f}]"
        lines.append(f"{name:36}{ratio['mean']:12.4f}   {spread}")
    return "\n".join(lines)


def make_bundle(folder: Path, shape: Shape, precision: Any) -> Path:
    """A random model and two adapters, exported with their proof: minutes for the default shape."""
    base = folder / "base"
    make_model(base, shape)
    adapters = {"one": folder / "one", "two": folder / "two"}
    for seed, path in enumerate(adapters.values(), 1):
        make_adapter(path, base, shape, seed)
    export(base, adapters, output=folder / "bundle", precision=precision)
    return folder / "bundle"


def main() -> None:
    parser = argparse.ArgumentParser(prog="ci/bench hot_loop", description=__doc__)
    parser.add_argument("--bundle", type=Path, help="a bundle with two adapters; else one is made")
    parser.add_argument("--precision", default="fp32", help="of the one that is made")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters that are made")
    parser.add_argument("--processes", type=int, default=5, help="fresh processes (default 5)")
    parser.add_argument("--turns", type=int, default=9, help="in each (default 9)")
    parser.add_argument("--tiny", action="store_true", help="a toy shape, to try the script")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    chosen = parser.parse_args()
    shape = SHAPES["tiny"] if chosen.tiny else replace(SHAPES["135M"], rank=chosen.rank)
    with tempfile.TemporaryDirectory() as folder:
        bundle = chosen.bundle or make_bundle(Path(folder), shape, chosen.precision)
        settings = {"prompt": PROMPT, "turns": chosen.turns, "clock": "cpu", "threads": 1} | {
            "precision": load_bundle(bundle).manifest.precision
        }
        runs = []
        for count in range(chosen.processes):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                runs.append(fresh.submit(measure, bundle, chosen.turns).result())
            print(f"process {count + 1} of {chosen.processes} done", file=sys.stderr, flush=True)
    made = report(runs, settings)
    print(table(made))
    if chosen.json:
        chosen.json.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
