"""Checkpoints: sealed, told from damaged ones, two of them kept; and who may write there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_edge.errors import BundleError
from lora_edge.files.hidden import LOCK_NAME
from lora_edge.files.lock import Lock
from lora_edge.training import train
from lora_edge.training.checkpoints import (
    SEAL_NAME,
    checkpoints,
    damage,
    latest_checkpoint,
    rotate,
    seal,
)
from lora_edge.training.runs import RUN_NAME


def _checkpoint(run: Path, step: int, best: Path | None = None) -> Path:
    path = run / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "optimizer.pt").write_bytes(bytes(range(200)))
    state = {"best_model_checkpoint": None if best is None else str(best)}
    (path / "trainer_state.json").write_text(json.dumps(state))
    seal(path)
    return path


def _cut(path: Path) -> None:
    file = path / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:100])


def _flip(path: Path) -> None:
    file = path / "optimizer.pt"
    file.write_bytes(file.read_bytes()[::-1])


def _lose(path: Path) -> None:
    (path / "optimizer.pt").unlink()


def _unseal(path: Path) -> None:
    (path / SEAL_NAME).unlink()


def _spoil_seal(path: Path) -> None:
    (path / SEAL_NAME).write_text('{"files": 3}')


def _cut_seal(path: Path) -> None:
    (path / SEAL_NAME).write_text("{")


def _empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


@pytest.mark.parametrize("spoil", [_cut, _flip, _lose, _unseal, _spoil_seal, _cut_seal, _empty])
def test_the_newest_whole_one_is_found(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    older, newer = _checkpoint(tmp_path, 9), _checkpoint(tmp_path, 10)
    assert checkpoints(tmp_path).latest == newer
    assert damage(newer) == ""
    spoil(newer)
    found = checkpoints(tmp_path)
    assert found.latest == older
    assert list(found.damaged) == [newer]
    assert found.damaged[newer]
    spoil(older)
    assert latest_checkpoint(tmp_path) is None


def test_one_whose_best_weights_are_gone_is_not_gone_on_from(tmp_path: Path) -> None:
    """They are loaded at the end of the run."""
    oldest = _checkpoint(tmp_path, 1)
    best = _checkpoint(tmp_path, 2, best=tmp_path / "checkpoint-2")
    last = _checkpoint(tmp_path, 3, best=best)
    assert checkpoints(tmp_path).latest == last
    _flip(best)
    found = checkpoints(tmp_path)
    assert found.latest == oldest
    assert "the best one so far, checkpoint-2, is not whole" in found.damaged[last]


def test_two_and_the_best_are_kept_and_later_ones_come_again(tmp_path: Path) -> None:
    made = {step: _checkpoint(tmp_path, step) for step in (2, 4, 6, 8, 20)}
    (tmp_path / "checkpoint-mine").mkdir()
    rotate(made[8], str(made[2]))
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-2",
        "checkpoint-6",
        "checkpoint-8",
        "checkpoint-mine",
    }


# --- the folder of a run -------------------------------------------------------------------------

RUN = {"max_steps": 2, "batch_size": 1, "rank": 2, "device": "cpu"}


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_is_no_runs_is_left(
    force: bool, base: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.run").mkdir()
    (tmp_path / "a.run" / "notes.txt").write_text("mine")
    before = _tree(tmp_path)
    with pytest.raises(BundleError, match=r"a\.run, where checkpoints go, holds files that are no"):
        train(base, data, tmp_path / "a", force=force, **RUN)
    assert _tree(tmp_path) == before


def test_what_is_beside_a_runs_files_is_left(base: Path, data: Path, tmp_path: Path) -> None:
    train(base, data, tmp_path / "a", **RUN)
    (tmp_path / "b.run").mkdir()
    shutil.copy(tmp_path / "a" / "training.json", tmp_path / "b.run" / RUN_NAME)
    (tmp_path / "b.run" / "notes.txt").write_text("mine")
    (tmp_path / "b.run" / "checkpoint-1").mkdir()
    train(base, data, tmp_path / "b", **RUN)
    assert [path.name for path in (tmp_path / "b.run").iterdir()] == ["notes.txt"]


def test_two_runs_to_one_output_at_once_are_one_too_many(
    base: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "a.run"
    kept = _checkpoint(run, 1)
    (run / RUN_NAME).write_text("{}")
    with Lock(run / LOCK_NAME, "it").held():
        for options in ({"resume": True}, {"force": True}, {}):
            with pytest.raises(BundleError, match=r"the run in .*a\.run is being written"):
                train(base, data, tmp_path / "a", **options, **RUN)
        assert damage(kept) == ""
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-1", RUN_NAME]
    assert not (tmp_path / "a").exists()


def test_a_run_into_the_folder_that_one_is_in(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    train(base, data, ".", **RUN)
    assert (tmp_path / "here" / "adapter_model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "here"}
    assert not [path for path in (tmp_path / "here").iterdir() if path.name.startswith(".")]
