"""The sweep: every architecture of transformers, tiny and random, with a LoRA, exported.

``ci/sweep`` runs what has no result yet, each cell in a process of its own with limits of time and
memory, and writes ``docs/architectures.md``; ``ci/sweep --only TEXT`` runs the cells whose name
holds TEXT again. Exit code 1 if anything ended otherwise than right or refused.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.support.architectures import Cell, Outcome, cells, outcome

_SECONDS, _WALL_SECONDS, _BYTES = 240, 1200, 12 << 30  # of the processor, of the clock


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("sweep.jsonl"))
    parser.add_argument("--write", type=Path, help="the page to write the table into")
    parser.add_argument("--only", help="run these again: a part of TYPE:TASK")
    parser.add_argument("--task", help="run the cells of this task only")
    parser.add_argument("--again", help="run those of this verdict again")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=1)
    options = parser.parse_args()
    known = {name: row for name, row in _read(options.results)}
    wanted = [cell for cell in cells() if _wanted(cell, known, options)]
    print(f"{len(wanted)} of {len(cells())} cells to run", flush=True)
    for cell, row in _run(wanted, options.jobs):
        known[_name(cell)] = row
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"cell": _name(cell), **row}) + "\n")
        print(
            f"{row['seconds']:5.1f} s  {_name(cell)}: {row['verdict']}: {row['reason']}"[:300],
            flush=True,
        )
    rows = {cell: known[_name(cell)] for cell in cells() if _name(cell) in known}
    print(Counter(row["verdict"] for row in rows.values()))
    if options.write:
        options.write.write_text(page(rows), encoding="utf-8")
    bad = [cell for cell, row in rows.items() if row["verdict"] == "fault"]
    return int(bool(bad) or len(rows) < len(cells()))


_TITLES: dict[str, str] = {
    "right": "Right: exported, and proved against PyTorch",
    "refused": "Refused by name",
    "not made": "Not tried: the tiny model or its adapter could not be made here",
    "fault": "Faults",
}


def page(rows: dict[Cell, dict[str, Any]]) -> str:
    """The table in Markdown, by verdict and task."""
    names = ("lora-edge", "torch", "transformers", "peft", "onnxruntime")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    counts = Counter(row["verdict"] for row in rows.values())
    lines = [
        "# Architectures",
        "",
        "Every architecture that transformers has for these tasks was made small and random, got",
        "a LoRA on all its linear layers (on its convolutions where it has none), and was exported",
        "as a switchable bundle. An export is published only if it equals PyTorch. Made by",
        f"`ci/sweep`, {date.today()}, with {versions}.",
        "",
        f"{len(rows)} of {len(cells())} cells were run: "
        + ", ".join(f"{counts[verdict]} {verdict}" for verdict in _TITLES)
        + ".",
        "",
    ]
    for verdict, title in _TITLES.items():
        lines += [f"## {title}", ""]
        own = [(cell, row) for cell, row in rows.items() if row["verdict"] == verdict]
        if verdict == "right":
            for task in dict.fromkeys(cell.task for cell, _ in own):
                types = ", ".join(f"`{cell.model_type}`" for cell, _ in own if cell.task == task)
                lines += [f"- **{task}**: {types}"]
        elif own:
            lines += ["| architecture | task | reason |", "|---|---|---|"]
            for cell, row in own:
                reason = row["reason"].replace("|", "\\|")[:240]
                lines.append(f"| `{cell.model_type}` | {cell.task} | {reason} |")
        else:
            lines.append("None.")
        lines.append("")
    return "\n".join(lines)


def _name(cell: Cell) -> str:
    return f"{cell.model_type}:{cell.task}"


def _wanted(cell: Cell, known: dict[str, Any], options: argparse.Namespace) -> bool:
    name = _name(cell)
    if options.task not in (None, cell.task):
        return False
    if options.only:
        return options.only in name
    if options.again and name in known:
        return bool(known[name]["verdict"] == options.again)
    return name not in known


def _read(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield row.pop("cell"), row


def _run(wanted: list[Cell], jobs: int) -> Iterator[tuple[Cell, dict[str, Any]]]:
    # A fork has PyTorch imported already; none of its threads has run in the parent.
    context = multiprocessing.get_context("fork")
    waiting, running = list(wanted), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            cell = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            folder = Path(tempfile.mkdtemp(prefix="sweep-"))
            process = context.Process(target=_child, args=(cell, theirs, folder))
            process.start()
            theirs.close()
            running[process] = cell, ours, folder, time.monotonic()
        time.sleep(0.05)
        for process, (cell, ours, folder, began) in list(running.items()):
            seconds = time.monotonic() - began
            if process.is_alive() and not ours.poll() and seconds < _WALL_SECONDS:
                continue
            found = Outcome("fault", f"no end within {_WALL_SECONDS} s")
            if ours.poll() or not process.is_alive():
                try:
                    found = ours.recv()
                except EOFError:
                    process.join()
                    found = Outcome("fault", f"the process died: exit code {process.exitcode}")
            process.kill()
            process.join()
            shutil.rmtree(folder, ignore_errors=True)
            del running[process]
            yield cell, {**found.__dict__, "seconds": round(seconds, 1)}


def _child(cell: Cell, answer: Connection, folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    own = resource.getrusage(resource.RUSAGE_SELF)
    used = int(own.ru_utime + own.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (used + _SECONDS, used + _SECONDS))
    try:
        answer.send(outcome(cell, folder))
    except MemoryError:
        answer.send(Outcome("fault", f"more than {_BYTES >> 30} GB of memory"))


if __name__ == "__main__":
    sys.exit(main())
