"""The folder of a run that is under way: its header, its checkpoints, and who may go on with it.

Knows files; knows nothing of models.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_edge.base import Base
from lora_edge.errors import AdapterError, BundleError
from lora_edge.training.data import DataFile
from lora_edge.training.record import RECORD_VERSION, Recipe, read_recipe, versions, write_json
from lora_edge.training.settings import Settings, changed

RUN_NAME = "run.json"


def header_of(
    base: Base, source: DataFile, judged: DataFile | None, settings: Settings
) -> dict[str, Any]:
    """What is known of a run before it begins: the beginning of its record."""
    header: dict[str, Any] = {
        "record_version": RECORD_VERSION,
        "base": base.name_or_path,
        "base_fingerprint": base.fingerprint(),
    }
    if source.labels:
        header["labels"] = list(source.labels)
    header["data"] = _named(source)
    if judged is not None:
        header["evaluation"] = _named(judged)
    return header | {"settings": settings.to_json(), "versions": versions()}


def _named(source: DataFile) -> dict[str, Any]:
    return {
        "path": str(source.path),
        "file": source.path.name,
        "kind": source.kind,
        "sha256": source.sha256,
    }


def open_run(
    run: Path, header: Mapping[str, Any], *, resume: bool, force: bool, main: bool
) -> Path | None:
    """Make the run's folder, or find the checkpoint to go on from.

    Args:
        run: the folder.
        header: of the run that is to begin.
        resume: go on with the run that is there.
        force: forget the run that is there.
        main: this is the first process, which alone writes.

    Raises:
        BundleError: nothing to resume, or an interrupted run that is in the way.
        AdapterError: the run that is there was begun with something else.
    """
    from lora_edge.training.loop import latest_checkpoint

    checkpoint = latest_checkpoint(run)
    if resume:
        if checkpoint is None:
            raise BundleError(f"{run} has no checkpoint to go on from", "Leave out --resume.")
        _check_same(read_recipe(run / RUN_NAME), header, run)
        return checkpoint
    if not main:
        return None
    if checkpoint is not None and not force:
        raise BundleError(
            f"{run} holds an interrupted run, up to {checkpoint.name}",
            "Give --resume to go on with it, or --force to begin anew.",
        )
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    write_json(run / RUN_NAME, header)
    return None


def _check_same(before: Recipe, header: Mapping[str, Any], run: Path) -> None:
    now = Settings.from_json(header["settings"])
    differing = list(changed(before.settings, now))
    if before.base_fingerprint != header["base_fingerprint"]:
        differing.append("base")
    if before.data_sha256 != header["data"]["sha256"]:
        differing.append("data")
    if before.evaluation_sha256 != header.get("evaluation", {}).get("sha256"):
        differing.append("evaluation")
    if differing:
        raise AdapterError(
            f"{run} was begun with another {' and '.join(differing)}",
            "Resume with the same arguments, or begin anew with --force.",
        )


@contextlib.contextmanager
def closing(run: Path, *, main: bool) -> Iterator[None]:
    """Leave a run's folder only if there is a checkpoint in it."""
    from lora_edge.training.loop import latest_checkpoint

    try:
        yield
    except BaseException:
        if main and latest_checkpoint(run) is None:
            shutil.rmtree(run, ignore_errors=True)
        raise
