"""The transaction: whole or not at all, nothing of anyone else's touched, whatever happens."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_edge.errors import BundleError
from lora_edge.files import disk, transaction
from lora_edge.files.hidden import LOCK_NAME
from lora_edge.files.owner import Owner
from lora_edge.files.transaction import check_free, staging, write_atomically
from tests.support.transactions import (
    BOOT,
    HOST,
    MARKER,
    add_part,
    in_a_process,
    make_old,
    names_in,
    race,
    record_of,
)


def _make(output: Path, text: str = "new", *, force: bool = False) -> None:
    with staging(output, marker=MARKER, force=force) as stage:
        (stage / "part").mkdir()
        (stage / "part" / "data").write_text(text)
        (stage / MARKER).write_text(text)


def _die_in_the_block(output: Path) -> None:
    with staging(output, marker=MARKER, force=True) as stage:
        (stage / "half").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


# --- a folder that is made anew ------------------------------------------------------------------


def test_an_error_leaves_nothing_behind_not_even_the_folders_above(tmp_path: Path) -> None:
    with (  # noqa: PT012
        pytest.raises(RuntimeError),
        staging(tmp_path / "deep" / "er" / "out", marker=MARKER) as stage,
    ):
        (stage / "half").write_text("half")
        raise RuntimeError
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("swaps", [True, False])
def test_force_replaces_what_lora_edge_made_only(
    swaps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swaps:  # a file system that cannot let two folders change places
        monkeypatch.setattr(transaction, "exchange", lambda *_: False)
    output = tmp_path / "out"
    make_old(output)
    _make(output, force=True)
    assert (output / MARKER).read_text() == "new"
    assert names_in(tmp_path) == {"out"}
    (output / MARKER).rename(output / "mine")
    with pytest.raises(BundleError, match="force"):
        _make(output, force=True)
    assert names_in(output) == {"mine", "part"}


@pytest.mark.skipif(sys.platform != "linux", reason="macOS is asked in another way")
def test_linux_lets_two_folders_change_places(tmp_path: Path) -> None:
    """Else the replacement would have a moment without either, and nobody would notice."""
    for name in ("a", "b"):
        make_old(tmp_path / name, name)
    assert disk.exchange(tmp_path / "a", tmp_path / "b")
    assert [(tmp_path / name / MARKER).read_text() for name in ("a", "b")] == ["b", "a"]
    with pytest.raises(FileNotFoundError):
        disk.exchange(tmp_path / "a", tmp_path / "none")


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    make_old(output)
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
    assert names_in(tmp_path) == {"out"}


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
    assert names_in(tmp_path) == {"out"}
    if thing == "folder":
        assert names_in(output) == {"mine"}


def test_of_two_that_make_one_folder_the_first_to_end_wins(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with (  # noqa: PT012
        pytest.raises(BundleError, match="out appeared while this was made"),
        staging(output, marker=MARKER) as stage,
    ):
        (stage / MARKER).write_text("first")
        _make(output, "second")
    assert (output / MARKER).read_text() == "second"
    assert names_in(tmp_path) == {"out"}


def test_of_two_that_fill_one_folder_the_first_to_begin_wins(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with staging(output, marker=MARKER) as stage:
        (stage / MARKER).write_text("first")
        with pytest.raises(BundleError, match="out is being written by another process"):
            _make(output, "second")
    assert (output / MARKER).read_text() == "first"
    assert names_in(output) == {MARKER}


@pytest.mark.parametrize("exists", [False, True])
def test_two_at_once_publish_one(exists: bool, tmp_path: Path) -> None:
    for number in range(12):
        output = tmp_path / f"{number}" / "out"
        output.parent.mkdir()
        if exists:
            output.mkdir()
        codes = race(lambda place, own: _make(place, f"by {own}"), output)
        assert codes in ([0, 3], [3, 3] if exists else [0, 3])
        if codes == [0, 3]:
            texts = {(output / name).read_text() for name in (MARKER, "part/data")}
            assert len(texts) == 1
        assert names_in(output.parent) <= {"out"}
        assert not output.exists() or names_in(output) in ({MARKER, "part"}, set())


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
    assert names_in(output) == {MARKER, "part"}
    assert output.stat().st_ino == number
    assert names_in(tmp_path) == {"out"}


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
        assert names_in(other) == {MARKER, "part"}
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
    assert names_in(tmp_path) == {"link", "real"}


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
    make_old(folder / "a")
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
    assert in_a_process(_die_in_the_block, output) == -signal.SIGKILL
    _make(output)
    _make(output, force=True)
    assert names_in(tmp_path) == {name}


# --- what dead processes left, and what is not theirs --------------------------------------------


@pytest.mark.parametrize("exists", [None, "empty", "old"])
def test_what_a_killed_process_left_is_cleared_up(exists: str | None, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if exists == "empty":
        output.mkdir()
    elif exists == "old":
        make_old(output)
    assert in_a_process(_die_in_the_block, output) == -signal.SIGKILL
    assert [*tmp_path.rglob("half")]
    _make(output, force=exists == "old")
    assert names_in(tmp_path) == {"out"}
    assert names_in(output) == {MARKER, "part"}


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
    (theirs,) = (name for name in names_in(tmp_path) if name.endswith(".partial"))
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
        "aa": record_of(foreign, target="out"),
        "bb": record_of(replace(here, boot=BOOT), target="out"),
        "cc": "",
        "dd": "{",
        "ee": record_of(here, target="../out"),
    }
    for token, record in makers.items():
        (tmp_path / f".out.{token}.partial").mkdir()
        (tmp_path / f".out.{token}.partial.lock").write_text(record)
    for name in (".out.4711-0a.partial", ".out.²-aa.partial", ".out.mine", ".other.ff.partial"):
        (tmp_path / name).mkdir()  # the first two as an earlier release named them
    kept = {name for name in names_in(tmp_path) if not name.endswith(".lock")}
    _make(tmp_path / "out")
    assert {name for name in names_in(tmp_path) if not name.endswith(".lock")} == kept | {"out"}


def test_a_maker_in_another_container_of_this_machine_is_judged_by_its_lock(tmp_path: Path) -> None:
    """Its process id means nothing here; the kernel that both have knows that nobody holds it."""
    record = record_of(replace(Owner.this(), host=HOST, space="pid:[1]", pid=1), target="out")
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
    assert names_in(tmp_path) == {"out"}


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
    make_old(output)
    assert in_a_process(die_between, output) == -signal.SIGKILL
    assert not output.exists()
    with pytest.raises(BundleError, match="not empty"):
        _make(output)
    assert (output / MARKER).read_text() == "old"
    assert names_in(tmp_path) == {"out"}


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
    assert names_in(tmp_path) == {"real", "link"}


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
    assert names_in(tmp_path) == {"report"}


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
    add_part(_changed(tmp_path), "a")
    at = done.index(f"name {MARKER}")
    assert {"fsync data", f"fsync {MARKER}.new", f"fsync {LOCK_NAME}"} <= set(done[:at])
    assert "fsync folder" in done[at:]
    done.clear()
    write_atomically(tmp_path / "report", "text")
    at = done.index("name report")
    assert any(x.startswith("fsync .report.") for x in done[:at])
    assert f"fsync {tmp_path.name}" in done[at:]


def _changed(folder: Path) -> Path:
    make_old(folder / "folder", "")
    return folder / "folder"
