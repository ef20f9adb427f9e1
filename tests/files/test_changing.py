"""A folder that is changed: whole or not at all, whoever dies or comes at the same time."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_edge.errors import BundleError
from lora_edge.files.changing import writing
from lora_edge.files.hidden import LOCK_NAME
from lora_edge.files.owner import Owner
from tests.support import transactions


def _after(count: int) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that kills the process before its ``count``-th change of the disk."""
    left = [count]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        if writes or event in {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def test_killed_anywhere_a_change_is_made_or_not_and_comes_again(tmp_path: Path) -> None:
    outcomes = set()
    for count in range(1, 60):
        folder = tmp_path / str(count)
        transactions.make_old(folder, "")
        transactions.add_part(folder, "a")

        def die(place: Path, number: int) -> None:
            sys.addaudithook(_after(number))
            transactions.add_part(place, "b", removed="a")

        code = transactions.in_a_process(die, folder, count)
        head = (folder / transactions.MARKER).read_text()
        assert head in {"a", "b"}
        assert (folder / "parts" / head / "data").read_text() == head
        outcomes.add((code, head))
        transactions.add_part(folder, "c")
        assert transactions.whole_parts(folder) == {head, "c"}
        if code == 0:
            break
    assert outcomes == {(-signal.SIGKILL, "a"), (-signal.SIGKILL, "b"), (0, "b")}
    assert count > 10


def test_killed_while_it_ends_what_another_began(tmp_path: Path) -> None:
    """The plan outlives the second death too."""
    folder = tmp_path / "folder"
    transactions.make_old(folder, "")

    def die(number: int, name: str) -> None:
        sys.addaudithook(_after(number))
        transactions.add_part(folder, name)

    placed = folder / "parts" / "a" / "data"
    numbers = iter(range(1, 40))
    while not placed.exists():
        assert transactions.in_a_process(die, next(numbers), "a") == -signal.SIGKILL
    assert not (folder / transactions.MARKER).read_text()
    for number in range(1, 40):
        done = transactions.in_a_process(die, number, "b") == 0
        assert (folder / transactions.MARKER).read_text() in {"", "b"}
        if done:
            break
    assert transactions.whole_parts(folder) == {"b"}


def test_two_that_change_one_folder_at_once_both_do(tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / str(number)
        transactions.make_old(folder, "")
        assert transactions.race(
            lambda place, own: transactions.add_part(place, f"by-{own}"), folder
        ) == [0, 0]
        assert transactions.whole_parts(folder) == {"by-1", "by-2"}


def test_a_change_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    transactions.make_old(folder, "")
    transactions.add_part(folder, "a")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="space"):
            transactions.add_part(folder, "b", removed="a")
    assert transactions.whole_parts(folder) == {"a"}


def test_a_file_that_is_in_the_way_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    transactions.make_old(folder, "")
    (folder / "parts" / "a").mkdir(parents=True)
    (folder / "parts" / "a" / "data").write_text("mine")
    with pytest.raises(BundleError, match="parts/a/data exists and does not belong"):
        transactions.add_part(folder, "a")
    assert (folder / "parts" / "a" / "data").read_text() == "mine"
    (folder / "parts" / "a" / "data").write_text("a")  # the same as the new one: it is adopted
    transactions.add_part(folder, "a")
    assert transactions.whole_parts(folder) == {"a"}


@pytest.mark.parametrize(
    "plan",
    [
        {"head": "../head.json", "placed": {"../mine": 0}},
        {"placed": {"../mine": 0, "/etc/passwd": 0, "out/mine": 0, "parts": 0, "keep": 1}},
        {"placed": ["../mine"], "folders": "x"},
        {"placed": None, "folders": ["..", "."]},
        "nonsense",
    ],
)
def test_a_plan_from_elsewhere_removes_nothing(plan: Any, tmp_path: Path) -> None:
    """A bundle from the network may hold a lock file, which says that its maker died."""
    folder = tmp_path / "folder"
    transactions.make_old(folder, "")
    (tmp_path / "mine").write_text("mine")
    (folder / "keep").write_text("mine")
    (folder / "out").symlink_to(tmp_path)
    numbers = {"../mine": (tmp_path / "mine").stat().st_ino}
    if isinstance(plan, dict):
        plan = {"head": transactions.MARKER, "sha256": "", "folders": [], "removed": {}} | plan
        if isinstance(plan["placed"], dict):
            number = numbers["../mine"]
            plan["placed"] = {k: v or number for k, v in plan["placed"].items()}
    (folder / LOCK_NAME).write_text(transactions.record_of(Owner.this(), plan=plan))
    with writing(folder):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
    assert (folder / "keep").read_text() == "mine"
    assert transactions.names_in(folder) == {transactions.MARKER, "keep", "out"}
