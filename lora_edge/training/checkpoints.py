"""Checkpoints of a run: each with a record of its files, so that one that is damaged is not used.

Knows files; knows nothing of models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_edge.errors import DataError
from lora_edge.files.disk import remove, sync_folder, sync_tree
from lora_edge.files.hashes import hash_file
from lora_edge.files.json import read_object
from lora_edge.files.transaction import write_atomically

SEAL_NAME = "lora_edge_checkpoint.json"
KEPT = 2
"""So many of the latest are kept, so that one is left where the other is damaged; and the best."""

_NAME = re.compile(r"checkpoint-(\d+)")
_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Checkpoints:
    """What a run's folder holds.

    Attributes:
        latest: the checkpoint of the most steps that is whole; ``None`` without one.
        damaged: later ones -> what is wrong with each.
    """

    latest: Path | None
    damaged: Mapping[Path, str]


def step_of(checkpoint: Path) -> int | None:
    """After how many optimizer steps it was written; ``None``: the path is no checkpoint's."""
    match = _NAME.fullmatch(checkpoint.name)
    return None if match is None else int(match[1])


def seal(checkpoint: Path) -> None:
    """Record size and hash of each file, once all are on the disk: it is whole from then on."""
    (checkpoint / SEAL_NAME).unlink(missing_ok=True)
    sync_tree(checkpoint)
    files = {
        path.relative_to(checkpoint).as_posix(): [path.stat().st_size, hash_file(path)]
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    write_atomically(checkpoint / SEAL_NAME, json.dumps({"files": files}, indent=1) + "\n")
    sync_folder(checkpoint.parent)


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; empty where it is as it was sealed."""
    try:
        files = read_object(checkpoint / SEAL_NAME, DataError, "").get("files")
        if not isinstance(files, dict) or _STATE not in files:
            return f"{SEAL_NAME} is damaged"
        for name, sealed in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            size = path.stat().st_size
            if [size, hash_file(path)] != sealed:
                return f"{name} is damaged ({size} bytes)"
        best = read_object(checkpoint / _STATE, DataError, "").get("best_model_checkpoint")
    except (DataError, OSError) as error:
        return "it was not written to its end" if not _is_sealed(checkpoint) else str(error)
    if isinstance(best, str) and Path(best).name != checkpoint.name:
        reason = damage(checkpoint.parent / Path(best).name)
        return reason and f"the best one so far, {Path(best).name}, is not whole: {reason}"
    return ""


def _is_sealed(checkpoint: Path) -> bool:
    return (checkpoint / SEAL_NAME).is_file()


def checkpoints(run: Path) -> Checkpoints:
    """The latest whole checkpoint of a run, and the later ones that are not."""
    found = {step: path for path in run.glob("checkpoint-*") if (step := step_of(path)) is not None}
    damaged: dict[Path, str] = {}
    for step in sorted(found, reverse=True):
        reason = damage(found[step])
        if not reason:
            return Checkpoints(found[step], damaged)
        damaged[found[step]] = reason
    return Checkpoints(None, damaged)


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint of the most steps in a run's folder that is whole."""
    return checkpoints(run).latest


def rotate(current: Path, best: str | None) -> None:
    """Remove the checkpoints beside ``current`` that are not kept.

    Args:
        current: the one that was written last; later ones come again.
        best: path of the one with the best evaluation, which is kept.
    """
    found = {step: x for x in current.parent.glob("checkpoint-*") if (step := step_of(x))}
    now = step_of(current) or 0
    kept = sorted(step for step in found if step <= now)[-KEPT:]
    for step, path in found.items():
        if step not in kept and (best is None or path.name != Path(best).name):
            remove(path)
