"""A lock: one holder, who says who it is; what the dead held is taken over."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lora_edge.errors import BundleError
from lora_edge.files import lock
from lora_edge.files.lock import Lock
from lora_edge.files.owner import Owner
from tests.support.transactions import HOST, in_a_process, record_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def test_a_lock_is_held_by_one_and_says_by_whom(path: Path) -> None:
    with Lock(path, "it").held():
        record = json.loads(path.read_text())
        assert {k: record[k] for k in asdict(Owner.this())} == asdict(Owner.this())
        with pytest.raises(BundleError, match=rf"it is being written by process {os.getpid()} on"):
            Lock(path, "it").acquire()
        os.utime(path, (0, 0))  # however old it is: the kernel knows that it is held
        with pytest.raises(BundleError, match="is being written"):
            Lock(path, "it").acquire()
    assert not path.exists()


def test_a_lock_that_was_replaced_under_its_holder_is_no_lock(path: Path) -> None:
    held = Lock(path, "it")
    held.acquire()
    path.unlink()
    with Lock(path, "it").held():
        held.release()
        assert path.exists()  # it is the other one's


@pytest.mark.parametrize("locks", [True, False])
def test_the_lock_of_a_dead_process_is_taken_over_with_its_notes(
    locks: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not locks:  # a file system that knows none
        monkeypatch.setattr(lock, "_locked", lambda _: None)

    def die() -> None:
        own = Lock(path, "it")
        own.acquire()
        own.note({"plan": "x"})
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_process(die) == -signal.SIGKILL
    with Lock(path, "it").held() as taken:
        assert taken.left["plan"] == "x"
        with pytest.raises(BundleError, match=f"by process {os.getpid()} on"):
            Lock(path, "it").acquire()
    assert not path.exists()


def test_a_process_id_that_another_process_has_by_now_is_a_dead_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_locked", lambda _: None)
    here = Owner.this()
    if not here.started:
        pytest.skip("the system does not say when a process began")
    path.write_text(record_of(here))
    with pytest.raises(BundleError, match="is being written"):
        Lock(path, "it").acquire()
    path.write_text(record_of(replace(here, started=here.started - 1)))
    with Lock(path, "it").held():
        pass


def test_a_lock_of_another_machine_is_judged_by_its_last_touch(path: Path, foreign: Owner) -> None:
    """That the kernel gave the lock proves nothing: it may keep locks to its own machine."""
    path.write_text(record_of(foreign))
    with pytest.raises(BundleError, match="by process 999999 on elsewhere, since 2026") as error:
        Lock(path, "it").acquire()
    assert f"remove {path}, or wait 10 minutes" in error.value.hint
    with pytest.raises(BundleError, match="is being written"):
        Lock(path, "it", stale=1e9).acquire()
    now = path.stat().st_mtime
    os.utime(path, (now - lock.STALE - 5, now - lock.STALE - 5))
    with Lock(path, "it").held() as taken:
        assert taken.left["host"] == HOST


def test_a_lock_that_is_held_for_long_is_touched(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_BEAT", 0.001)
    touched = multiprocessing.get_context("fork").Event()
    monkeypatch.setattr(os, "utime", lambda _: touched.set())
    with Lock(path, "it", beat=True).held():
        assert touched.wait(30)


def test_a_lock_is_written_through_no_link(path: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    path.symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match=re.escape(str(path))):
        Lock(path, "it").acquire()
    assert (tmp_path / "mine").read_text() == "mine"
