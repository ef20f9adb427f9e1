"""The transaction: whole or not at all, nothing of anyone else's touched, whatever happens."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lora_edge.errors import BundleError
from lora_edge.files import disk, lock, transaction
from lora_edge.files.lock import Lock
from lora_edge.files.owner import Owner
from lora_edge.files.transaction import (
    LOCK_NAME,
    check_free,
    preparing,
    staging,
    write_atomically,
    writing,
)

MARKER = "head.json"
HOST, BOOT = "elsewhere/0242ac110002", "00000000-0000-4000-8000-000000000000"


def _old(output: Path, text: str = "old") -> None:
    output.mkdir(parents=True)
    (output / MARKER).write_text(text)


def _make(output: Path, text: str = "new", *, force: bool = False) -> None:
    with staging(output, marker=MARKER, force=force) as stage:
        (stage / "part").mkdir()
        (stage / "part" / "data").write_text(text)
        (stage / MARKER).write_text(text)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _in_a_process(work: Callable[..., None], *arguments: Any) -> int:
    """Run something in a process of its own; its exit code, negative where it was killed."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _die_in_the_block(output: Path) -> None:
    with staging(output, marker=MARKER, force=True) as stage:
        (stage / "half").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def _record_of(owner: Owner, **facts: Any) -> str:
    return json.dumps(asdict(owner) | {"token": "t", "since": "2026-01-01 00:00:00"} | facts)


@pytest.fixture
def foreign() -> Owner:
    """A process of another host, with the id of one that does not run here."""
    return Owner(HOST, BOOT, "pid:[1]", 999_999, 1)


# --- a folder that is made anew ------------------------------------------------------------------


def test_an_error_leaves_nothing_behind_not_even_the_folders_above(tmp_path: Path) -> None:
    with (  # noqa: PT012
        pytest.raises(RuntimeError),
        staging(tmp_path / "deep" / "er" / "out", marker=MARKER) as stage,
    ):
        (stage / "half").write_text("half")
        raise RuntimeError
    assert _names(tmp_path) == set()


@pytest.mark.parametrize("swaps", [True, False])
def test_force_replaces_what_lora_edge_made_only(
    swaps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swaps:  # a file system that cannot let two folders change places
        monkeypatch.setattr(transaction, "exchange", lambda *_: False)
    output = tmp_path / "out"
    _old(output)
    _make(output, force=True)
    assert (output / MARKER).read_text() == "new"
    assert _names(tmp_path) == {"out"}
    (output / MARKER).rename(output / "mine")
    with pytest.raises(BundleError, match="force"):
        _make(output, force=True)
    assert _names(output) == {"mine", "part"}


@pytest.mark.skipif(sys.platform != "linux", reason="macOS is asked in another way")
def test_linux_lets_two_folders_change_places(tmp_path: Path) -> None:
    """Else the replacement would have a moment without either, and nobody would notice."""
    for name in ("a", "b"):
        _old(tmp_path / name, name)
    assert disk.exchange(tmp_path / "a", tmp_path / "b")
    assert [(tmp_path / name / MARKER).read_text() for name in ("a", "b")] == ["b", "a"]
    with pytest.raises(FileNotFoundError):
        disk.exchange(tmp_path / "a", tmp_path / "none")


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    _old(output)
    rename = os.rename

    def fail_on_stage(source: Path, target: Path) -> None:
        if source.suffix == ".partial" and target == output:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(transaction, "exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", fail_on_stage)
    with pytest.raises(OSError, match="space"):
        _make(output, force=True)
    assert (output / MARKER).read_text() == "old"
    assert _names(tmp_path) == {"out"}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("thing", ["folder", "file", "link"])
def test_what_appears_at_the_output_meanwhile_is_left(
    thing: str, force: bool, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with (  # noqa: PT012
        pytest.raises(BundleError, match=r"appeared while|changed meanwhile"),
        staging(output, marker=MARKER, force=force) as stage,
    ):
        (stage / MARKER).write_text("new")
        if thing == "folder":
            output.mkdir()
            (output / "mine").write_text("mine")
        elif thing == "file":
            output.write_text("mine")
        else:
            output.symlink_to(tmp_path / "nowhere")
    assert _names(tmp_path) == {"out"}
    if thing == "folder":
        assert _names(output) == {"mine"}


def test_of_two_that_make_one_folder_the_first_to_end_wins(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with (  # noqa: PT012
        pytest.raises(BundleError, match="out appeared while this was made"),
        staging(output, marker=MARKER) as stage,
    ):
        (stage / MARKER).write_text("first")
        _make(output, "second")
    assert (output / MARKER).read_text() == "second"
    assert _names(tmp_path) == {"out"}


def test_of_two_that_fill_one_folder_the_first_to_begin_wins(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with staging(output, marker=MARKER) as stage:
        (stage / MARKER).write_text("first")
        with pytest.raises(BundleError, match="out is being written by another process"):
            _make(output, "second")
    assert (output / MARKER).read_text() == "first"
    assert _names(output) == {MARKER}


def _race(work: Callable[..., None], *arguments: Any) -> list[int]:
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


@pytest.mark.parametrize("exists", [False, True])
def test_two_at_once_publish_one(exists: bool, tmp_path: Path) -> None:
    for number in range(12):
        output = tmp_path / f"{number}" / "out"
        output.parent.mkdir()
        if exists:
            output.mkdir()
        codes = _race(lambda place, own: _make(place, f"by {own}"), output)
        assert codes in ([0, 3], [3, 3] if exists else [0, 3])
        if codes == [0, 3]:
            texts = {(output / name).read_text() for name in (MARKER, "part/data")}
            assert len(texts) == 1
        assert _names(output.parent) <= {"out"}
        assert not output.exists() or _names(output) in ({MARKER, "part"}, set())


# --- where the output is, seen before the work ---------------------------------------------------


def test_a_folder_that_is_there_and_empty_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from inside; it stays the same folder, which a shell or a mount may stand in."""
    output = tmp_path / "out"
    output.mkdir()
    number = output.stat().st_ino
    monkeypatch.chdir(output)
    _make(Path("."))
    assert _names(output) == {MARKER, "part"}
    assert output.stat().st_ino == number
    assert _names(tmp_path) == {"out"}


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may mount")
def test_a_mount_point_is_filled_and_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    other = tmp_path / "disk"
    other.mkdir()
    # A bind mount of the same file system is one that os.path.ismount does not see.
    done = subprocess.run(["mount", "--bind", other, output], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("nothing may be mounted here")
    try:
        assert not os.path.ismount(output)
        _make(output)
        assert _names(other) == {MARKER, "part"}
        with pytest.raises(BundleError, match="is a mount point"):
            check_free(output, marker=MARKER, force=True)
    finally:
        subprocess.run(["umount", output], check=True)


def test_a_link_is_followed(tmp_path: Path) -> None:
    """One that leads nowhere is filled at its end; with --force the folder behind is replaced."""
    (tmp_path / "link").symlink_to(tmp_path / "real")
    _make(tmp_path / "link", "one")
    assert (tmp_path / "real" / MARKER).read_text() == "one"
    _make(tmp_path / "link", "two", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / MARKER).read_text() == "two"
    assert _names(tmp_path) == {"link", "real"}


def _circle(folder: Path) -> Path:
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")
    return folder / "a"


def _file(folder: Path) -> Path:
    (folder / "a").write_text("mine")
    return folder / "a"


def _below_a_file(folder: Path) -> Path:
    return _file(folder) / "out"


def _around_here(folder: Path) -> Path:
    _old(folder / "a")
    (folder / "a" / "b").mkdir()
    os.chdir(folder / "a" / "b")
    return folder / "a"


def _much_too_long(folder: Path) -> Path:
    return folder / ("x" * 300)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (_circle, "link to itself|cannot be a folder"),
        (_file, "is no folder"),
        (_below_a_file, "cannot write|is no folder"),
        (_around_here, "the folder that this command was called in"),
        (_much_too_long, "cannot be a folder"),
        (lambda _: Path("/"), "root|not empty|has no"),
        (lambda _: Path("a\0b"), "cannot be a folder"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_the_work(
    place: Callable[[Path], Path], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = place(tmp_path)
    before = {path for path in tmp_path.rglob("*") if not path.is_symlink()}
    worked = False
    with (
        pytest.raises(BundleError, match=words),
        staging(output, marker=MARKER, force=True),
    ):
        worked = True
    assert not worked
    assert {path for path in tmp_path.rglob("*") if not path.is_symlink()} == before


@pytest.mark.parametrize(
    "name", ["a[b]", "ü" * 100, "x" * 240, "-o", " a ", "a.partial", ".x.²-aa"]
)
def test_names_of_all_kinds(name: str, tmp_path: Path) -> None:
    output = tmp_path / name
    assert _in_a_process(_die_in_the_block, output) == -signal.SIGKILL
    _make(output)
    _make(output, force=True)
    assert _names(tmp_path) == {name}


# --- what dead processes left, and what is not theirs --------------------------------------------


@pytest.mark.parametrize("exists", [None, "empty", "old"])
def test_what_a_killed_process_left_is_cleared_up(exists: str | None, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if exists == "empty":
        output.mkdir()
    elif exists == "old":
        _old(output)
    assert _in_a_process(_die_in_the_block, output) == -signal.SIGKILL
    assert [*tmp_path.rglob("half")]
    _make(output, force=exists == "old")
    assert _names(tmp_path) == {"out"}
    assert _names(output) == {MARKER, "part"}


def _wait_in_the_block(output: Path, told: Any, goes_on: Any) -> None:
    with staging(output, marker=MARKER) as stage:
        (stage / MARKER).write_text("theirs")
        told.set()
        goes_on.wait()


def test_what_a_running_process_has_is_left(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    told, goes_on = context.Event(), context.Event()
    output = tmp_path / "out"
    process = context.Process(target=_wait_in_the_block, args=(output, told, goes_on))
    process.start()
    told.wait()
    (theirs,) = (name for name in _names(tmp_path) if name.endswith(".partial"))
    with pytest.raises(RuntimeError), staging(output, marker=MARKER):
        raise RuntimeError
    assert (tmp_path / theirs / MARKER).read_text() == "theirs"
    goes_on.set()
    process.join()
    assert process.exitcode == 0
    assert (output / MARKER).read_text() == "theirs"


def test_what_is_not_known_to_be_a_dead_process_of_here_is_left(
    tmp_path: Path, foreign: Owner
) -> None:
    """Of another host or container; of another start of this one; of nobody that is known."""
    here = Owner.this()
    makers = {
        "aa": _record_of(foreign, target="out"),
        "bb": _record_of(replace(here, boot=BOOT), target="out"),
        "cc": "",
        "dd": "{",
        "ee": _record_of(here, target="../out"),
    }
    for token, record in makers.items():
        (tmp_path / f".out.{token}.partial").mkdir()
        (tmp_path / f".out.{token}.partial.lock").write_text(record)
    for name in (".out.4711-0a.partial", ".out.²-aa.partial", ".out.mine", ".other.ff.partial"):
        (tmp_path / name).mkdir()  # the first two as an earlier release named them
    kept = {name for name in _names(tmp_path) if not name.endswith(".lock")}
    _make(tmp_path / "out")
    assert {name for name in _names(tmp_path) if not name.endswith(".lock")} == kept | {"out"}


def test_a_maker_in_another_container_of_this_machine_is_judged_by_its_lock(tmp_path: Path) -> None:
    """Its process id means nothing here; the kernel that both have knows that nobody holds it."""
    record = _record_of(replace(Owner.this(), host=HOST, space="pid:[1]", pid=1), target="out")
    path = tmp_path / ".out.aa.partial"
    path.mkdir()
    lock_file = tmp_path / ".out.aa.partial.lock"
    lock_file.write_text(record)
    with lock_file.open() as held:
        fcntl = pytest.importorskip("fcntl", reason="as on Linux")
        fcntl.flock(held, fcntl.LOCK_EX)
        _make(tmp_path / "out")
        assert path.exists()
    _make(tmp_path / "out", force=True)
    assert _names(tmp_path) == {"out"}


def test_a_folder_put_aside_by_a_killed_process_comes_back(tmp_path: Path) -> None:
    """Where the two could not change places in one step."""

    def die_between(output: Path) -> None:
        transaction.exchange = lambda *_: False
        rename = os.rename

        def kill_before_the_second(source: Path, target: Path) -> None:
            if target == output:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        os.rename = kill_before_the_second  # type: ignore[assignment]
        _make(output, force=True)

    output = tmp_path / "out"
    _old(output)
    assert _in_a_process(die_between, output) == -signal.SIGKILL
    assert not output.exists()
    with pytest.raises(BundleError, match="not empty"):
        _make(output)
    assert (output / MARKER).read_text() == "old"
    assert _names(tmp_path) == {"out"}


# --- a folder that is changed --------------------------------------------------------------------


def _change(folder: Path, name: str, *, removed: str = "") -> None:
    """Add a file that the head names, as a list of names."""
    with preparing(folder) as stage:
        (stage / "parts" / name).mkdir(parents=True)
        (stage / "parts" / name / "data").write_text(name)
        with writing(folder) as change:
            names = set((folder / MARKER).read_text().split())
            text = " ".join(sorted((names | {name}) - {removed}))
            gone = [f"parts/{removed}/data"] if removed else []
            change.commit(stage, [f"parts/{name}/data"], MARKER, text.encode(), gone)


def _whole(folder: Path) -> set[str]:
    """The names in the head, which are those of the parts, all of them whole."""
    names = set((folder / MARKER).read_text().split())
    parts = folder / "parts"
    assert names == (_names(parts) if parts.is_dir() else set())
    assert all((parts / name / "data").read_text() == name for name in names)
    assert _names(folder) <= {MARKER, "parts"}
    return names


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
        _old(folder, "")
        _change(folder, "a")

        def die(place: Path, number: int) -> None:
            sys.addaudithook(_after(number))
            _change(place, "b", removed="a")

        code = _in_a_process(die, folder, count)
        head = (folder / MARKER).read_text()
        assert head in {"a", "b"}
        assert (folder / "parts" / head / "data").read_text() == head
        outcomes.add((code, head))
        _change(folder, "c")
        assert _whole(folder) == {head, "c"}
        if code == 0:
            break
    assert outcomes == {(-signal.SIGKILL, "a"), (-signal.SIGKILL, "b"), (0, "b")}
    assert count > 10


def test_killed_while_it_ends_what_another_began(tmp_path: Path) -> None:
    """The plan outlives the second death too."""
    folder = tmp_path / "folder"
    _old(folder, "")

    def die(number: int, name: str) -> None:
        sys.addaudithook(_after(number))
        _change(folder, name)

    placed = folder / "parts" / "a" / "data"
    numbers = iter(range(1, 40))
    while not placed.exists():
        assert _in_a_process(die, next(numbers), "a") == -signal.SIGKILL
    assert not (folder / MARKER).read_text()
    for number in range(1, 40):
        done = _in_a_process(die, number, "b") == 0
        assert (folder / MARKER).read_text() in {"", "b"}
        if done:
            break
    assert _whole(folder) == {"b"}


def test_two_that_change_one_folder_at_once_both_do(tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / str(number)
        _old(folder, "")
        assert _race(lambda place, own: _change(place, f"by-{own}"), folder) == [0, 0]
        assert _whole(folder) == {"by-1", "by-2"}


def test_a_change_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    _old(folder, "")
    _change(folder, "a")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(transaction.os, "replace", full)
        with pytest.raises(OSError, match="space"):
            _change(folder, "b", removed="a")
    assert _whole(folder) == {"a"}


def test_a_file_that_is_in_the_way_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    _old(folder, "")
    (folder / "parts" / "a").mkdir(parents=True)
    (folder / "parts" / "a" / "data").write_text("mine")
    with pytest.raises(BundleError, match="parts/a/data exists and does not belong"):
        _change(folder, "a")
    assert (folder / "parts" / "a" / "data").read_text() == "mine"
    (folder / "parts" / "a" / "data").write_text("a")  # the same as the new one: it is adopted
    _change(folder, "a")
    assert _whole(folder) == {"a"}


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
    _old(folder, "")
    (tmp_path / "mine").write_text("mine")
    (folder / "keep").write_text("mine")
    (folder / "out").symlink_to(tmp_path)
    numbers = {"../mine": (tmp_path / "mine").stat().st_ino}
    if isinstance(plan, dict):
        plan = {"head": MARKER, "sha256": "", "folders": [], "removed": {}} | plan
        if isinstance(plan["placed"], dict):
            number = numbers["../mine"]
            plan["placed"] = {k: v or number for k, v in plan["placed"].items()}
    (folder / LOCK_NAME).write_text(_record_of(Owner.this(), plan=plan))
    with writing(folder):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
    assert (folder / "keep").read_text() == "mine"
    assert _names(folder) == {MARKER, "keep", "out"}


# --- the lock ------------------------------------------------------------------------------------


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

    assert _in_a_process(die) == -signal.SIGKILL
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
    path.write_text(_record_of(here))
    with pytest.raises(BundleError, match="is being written"):
        Lock(path, "it").acquire()
    path.write_text(_record_of(replace(here, started=here.started - 1)))
    with Lock(path, "it").held():
        pass


def test_a_lock_of_another_machine_is_judged_by_its_last_touch(path: Path, foreign: Owner) -> None:
    """That the kernel gave the lock proves nothing: it may keep locks to its own machine."""
    path.write_text(_record_of(foreign))
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


# --- a file --------------------------------------------------------------------------------------


def test_a_file_is_replaced_with_its_mode_and_through_its_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    write_atomically(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert real.stat().st_mode & 0o777 == 0o640
    assert _names(tmp_path) == {"real", "link"}


def test_a_device_is_written_to(tmp_path: Path) -> None:
    write_atomically(Path(os.devnull), "text")
    assert not Path(os.devnull).is_file()
    write_atomically(tmp_path / "new", "text")
    assert (tmp_path / "new").read_text() == "text"


def test_a_file_that_cannot_be_replaced_is_written_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that a container's runtime has mounted, for example."""

    def busy(*_: object) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(transaction.os, "replace", busy)
    (tmp_path / "report").write_text("old")
    write_atomically(tmp_path / "report", "new")
    assert (tmp_path / "report").read_text() == "new"
    with pytest.raises(OSError, match="busy"):
        write_atomically(tmp_path / "other", "new")
    assert _names(tmp_path) == {"report"}


# --- what the disk is asked for ------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced, and what gets its name, in this order."""
    found: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}

    def fsync(file: int) -> None:
        found.append("fsync " + Path(os.readlink(f"/proc/self/fd/{file}")).name)
        real["fsync"](file)

    def rename(source: Path, target: Path) -> None:
        found.append(f"name {Path(target).name}")
        real["rename"](source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", rename)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which file is open")
def test_content_is_on_the_disk_before_its_name_and_the_name_after(
    tmp_path: Path, asked: list[str]
) -> None:
    done = asked
    _make(tmp_path / "out")
    at = done.index("name out")
    assert {"fsync data", f"fsync {MARKER}", "fsync part"} <= set(done[:at])
    assert f"fsync {tmp_path.name}" in done[at:]
    done.clear()
    _change(_changed(tmp_path), "a")
    at = done.index(f"name {MARKER}")
    assert {"fsync data", f"fsync {MARKER}.new", f"fsync {LOCK_NAME}"} <= set(done[:at])
    assert "fsync folder" in done[at:]
    done.clear()
    write_atomically(tmp_path / "report", "text")
    at = done.index("name report")
    assert any(x.startswith("fsync .report.") for x in done[:at])
    assert f"fsync {tmp_path.name}" in done[at:]


def _changed(folder: Path) -> Path:
    _old(folder / "folder", "")
    return folder / "folder"
