"""Staging: whole or not at all, whatever happens in between."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_edge.errors import BundleError
from lora_edge.manifest import MANIFEST_NAME
from lora_edge.staging import staging


def _dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def _old(output: Path) -> None:
    output.mkdir()
    (output / MANIFEST_NAME).write_text("old")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with staging(tmp_path / "out") as stage:
            (stage / "half").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert _names(tmp_path) == set()


def test_force_replaces_what_lora_edge_made_only(tmp_path: Path) -> None:
    output = tmp_path / "out"
    _old(output)
    with staging(output, force=True) as stage:
        (stage / MANIFEST_NAME).write_text("new")
    assert (output / MANIFEST_NAME).read_text() == "new"
    assert _names(tmp_path) == {"out"}
    (output / MANIFEST_NAME).rename(output / "mine")
    with pytest.raises(BundleError, match="force"), staging(output, force=True):
        pass
    assert _names(output) == {"mine"}


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    _old(output)
    rename = Path.rename

    def fail_on_stage(self: Path, target: Path) -> Path:
        if self.suffix == ".partial" and target == output:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_on_stage)
    with pytest.raises(OSError, match="space"), staging(output, force=True):
        pass
    assert (output / MANIFEST_NAME).read_text() == "old"
    assert _names(tmp_path) == {"out"}


def test_what_a_killed_process_left_is_cleared_up_and_a_running_ones_is_not(tmp_path: Path) -> None:
    dead = tmp_path / f".out.{_dead_process()}-0a.partial"
    running = tmp_path / f".out.{os.getpid()}-0b.partial"
    for folder in (dead, running):
        folder.mkdir()
    with staging(tmp_path / "out"):
        pass
    assert _names(tmp_path) == {"out", running.name}


def test_a_folder_put_aside_by_a_killed_process_comes_back(tmp_path: Path) -> None:
    _old(tmp_path / f".out.{_dead_process()}-0a.old")
    with pytest.raises(BundleError, match="not empty"), staging(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / MANIFEST_NAME).read_text() == "old"
    assert _names(tmp_path) == {"out"}
