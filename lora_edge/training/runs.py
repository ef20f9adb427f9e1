"""The folder of a run that is under way: its header, its checkpoints, and who may go on with it.

Knows files; knows nothing of models.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_edge.base.checkpoint import Base
from lora_edge.errors import AdapterError, BundleError
from lora_edge.files.disk import remove
from lora_edge.files.hidden import LOCK_NAME, is_hidden
from lora_edge.files.lock import Lock
from lora_edge.files.transaction import parents
from lora_edge.training.checkpoints import checkpoints, latest_checkpoint, step_of
from lora_edge.training.data import DataFile
from lora_edge.training.record import (
    METRICS_NAME,
    RECORD_VERSION,
    TENSORBOARD_NAME,
    Recipe,
    read_recipe,
    versions,
    write_json,
)
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


@contextlib.contextmanager
def running(
    run: Path,
    header: Mapping[str, Any],
    *,
    resume: bool,
    force: bool,
    main: bool,
    notify: Callable[[str], None],
) -> Iterator[Path | None]:
    """Hold a run's folder: with the checkpoint to go on from, or ``None``.

    When the block ends without an error the folder goes; with one, it stays if there is a whole
    checkpoint in it. Files in it that no run has made are left.

    Args:
        run: the folder.
        header: of the run that is to begin.
        resume: go on with the run that is there.
        force: forget the run that is there.
        main: this is the first process, which alone writes.
        notify: called with a line for each checkpoint that is passed over.

    Raises:
        BundleError: nothing to resume; an interrupted run is in the way, or a folder that is no
            run's, or another process.
        AdapterError: the run that is there was begun with something else.
    """
    if not main:
        yield _to_go_on_from(run, header, notify) if resume else None
        return
    _check_folder(run)
    if resume and not run.exists():
        raise _nothing(run)
    with parents(run), Lock(run / LOCK_NAME, f"the run in {run}", beat=True).held():
        checkpoint = None
        if resume:
            checkpoint = _to_go_on_from(run, header, notify)
        else:
            _begin(run, header, force=force)
        try:
            yield checkpoint
        except BaseException:
            if latest_checkpoint(run) is None:
                _clear(run)
            raise
        _clear(run)
    with contextlib.suppress(OSError):
        run.rmdir()  # one that was there before, if nothing else is in it


def _check_folder(run: Path) -> None:
    if not os.path.lexists(run):
        return
    if not run.is_dir():
        raise BundleError(
            f"{run}, where checkpoints go, exists and is no folder", "Choose another output."
        )
    if not (run / RUN_NAME).is_file() and any(not is_hidden(x.name) for x in run.iterdir()):
        raise BundleError(
            f"{run}, where checkpoints go, holds files that are no run's", "Choose another output."
        )


def _begin(run: Path, header: Mapping[str, Any], *, force: bool) -> None:
    checkpoint = latest_checkpoint(run)
    if checkpoint is not None and not force:
        raise BundleError(
            f"{run} holds an interrupted run, up to {checkpoint.name}",
            "Give --resume to go on with it, or --force to begin anew.",
        )
    _clear(run)
    write_json(run / RUN_NAME, header)


def _to_go_on_from(run: Path, header: Mapping[str, Any], notify: Callable[[str], None]) -> Path:
    found = checkpoints(run)
    for path, reason in found.damaged.items():
        notify(f"{path.name} is passed over: {reason}")
    if found.latest is None:
        raise _nothing(run)
    _check_same(read_recipe(run / RUN_NAME), header, run)
    return found.latest


def _nothing(run: Path) -> BundleError:
    return BundleError(f"{run} has no whole checkpoint to go on from", "Leave out --resume.")


def _clear(run: Path) -> None:
    """Remove what a run makes, its mark last."""
    made = [path for path in run.iterdir() if step_of(path) is not None]
    for path in (*made, run / METRICS_NAME, run / TENSORBOARD_NAME, run / RUN_NAME):
        remove(path)


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
