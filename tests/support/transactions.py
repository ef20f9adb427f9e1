"""Folders that are made and changed, in this process and in others that die or race."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_edge.errors import BundleError
from lora_edge.files.changing import preparing, writing
from lora_edge.files.owner import Owner

MARKER = "head.json"
HOST, BOOT = "elsewhere/0242ac110002", "00000000-0000-4000-8000-000000000000"


def make_old(output: Path, text: str = "old") -> None:
    output.mkdir(parents=True)
    (output / MARKER).write_text(text)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def in_a_process(work: Callable[..., None], *arguments: Any) -> int:
    """Run something in a process of its own; its exit code, negative where it was killed."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def race(work: Callable[..., None], *arguments: Any) -> list[int]:
    """Exit codes of two processes that do the same at once; 3: a refusal by name."""

    def run(barrier: Any, number: int) -> None:
        barrier.wait()
        try:
            work(*arguments, number)
        except BundleError:
            os._exit(3)

    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=run, args=(barrier, number)) for number in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return sorted(process.exitcode or 0 for process in processes)


def record_of(owner: Owner, **facts: Any) -> str:
    return json.dumps(asdict(owner) | {"token": "t", "since": "2026-01-01 00:00:00"} | facts)


def add_part(folder: Path, name: str, *, removed: str = "") -> None:
    """Add a file that the head names, as a list of names."""
    with preparing(folder) as stage:
        (stage / "parts" / name).mkdir(parents=True)
        (stage / "parts" / name / "data").write_text(name)
        with writing(folder) as change:
            names = set((folder / MARKER).read_text().split())
            text = " ".join(sorted((names | {name}) - {removed}))
            gone = [f"parts/{removed}/data"] if removed else []
            change.commit(stage, [f"parts/{name}/data"], MARKER, text.encode(), gone)


def whole_parts(folder: Path) -> set[str]:
    """The names in the head, which are those of the parts, all of them whole."""
    names = set((folder / MARKER).read_text().split())
    parts = folder / "parts"
    assert names == (names_in(parts) if parts.is_dir() else set())
    assert all((parts / name / "data").read_text() == name for name in names)
    assert names_in(folder) <= {MARKER, "parts"}
    return names
