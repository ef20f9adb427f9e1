"""A folder that is changed, while others read it and may want to change it too.

New files are made in a hidden folder; under the folder's lock they get their names, and then one
file, the head, which names what belongs to the folder, is replaced. Until then nothing has changed.
Knows files; knows nothing of what is in them.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lora_edge.errors import BundleError
from lora_edge.files.disk import remove, sync_folder, sync_tree
from lora_edge.files.hidden import LOCK_NAME, OWN, WAIT, clear, is_inside, scratch
from lora_edge.files.lock import Lock


@contextlib.contextmanager
def preparing(folder: Path) -> Iterator[Path]:
    """A hidden folder in ``folder``, for new files of it under the names that they will have."""
    with scratch(folder, OWN) as path:
        path.mkdir()
        yield path


class Writing:
    """A folder that this process alone changes, as long as it holds the lock."""

    def __init__(self, folder: Path, lock: Lock) -> None:
        self._folder = folder
        self._lock = lock

    def commit(
        self,
        prepared: Path,
        placed: Sequence[str],
        head: str,
        text: bytes,
        removed: Sequence[str] = (),
    ) -> None:
        """Put new files in place, replace the head, and remove old files, in this order.

        Once the head is replaced the change is made. If anything fails, or the process dies, before
        that, then the new files go again; after that the old files go, at the latest when the next
        process takes the lock.

        Args:
            prepared: where the new files are; see :func:`preparing`.
            placed: relative paths of new files or folders. One that is in the folder already, with
                the same content, is left.
            head: relative path of the file that names what belongs to the folder.
            text: its new content.
            removed: relative paths of files that no longer belong to it; folders that they leave
                empty go too.

        Raises:
            BundleError: a new file's name is taken by something that does not belong to the folder.
        """
        placed = [name for name in placed if not self._is_there(prepared, name)]
        new = prepared / f"{head}.new"
        new.write_bytes(text)
        sync_tree(prepared)
        above = {parent for name in placed for parent in PurePosixPath(name).parents}
        folders = [
            str(parent)
            for parent in sorted(above - {PurePosixPath()}, key=lambda x: len(x.parts))
            if not (self._folder / parent).exists()
        ]
        plan = {
            "head": head,
            "sha256": hashlib.sha256(text).hexdigest(),
            # Whoever removes them sees by the numbers that nobody else has put others there.
            "placed": {name: os.lstat(prepared / name).st_ino for name in placed},
            "folders": folders,
            "removed": {
                name: os.lstat(self._folder / name).st_ino
                for name in removed
                if os.path.lexists(self._folder / name)
            },
        }
        self._lock.note({"plan": plan})
        sync_folder(self._folder)
        try:
            for folder in folders:
                (self._folder / folder).mkdir()
            for name in placed:
                os.rename(prepared / name, self._folder / name)
            for path in {(self._folder / name).parent for name in (*placed, *folders)}:
                sync_folder(path)
            os.replace(new, self._folder / head)
            sync_folder(self._folder)
        finally:
            _settle(self._folder, plan)

    def _is_there(self, prepared: Path, name: str) -> bool:
        path = self._folder / name
        if not os.path.lexists(path):
            return False
        if path.is_file() and not path.is_symlink():
            new = prepared / name
            if new.is_file() and new.read_bytes() == path.read_bytes():
                return True
        raise BundleError(
            f"{path} exists and does not belong to {self._folder}",
            "See what it is, and remove or rename it.",
        )


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[Writing]:
    """Hold a folder's lock; what a process that died had begun in it is ended first.

    Raises:
        BundleError: another process holds it for more than a minute.
    """
    lock = folder_lock(folder)
    with lock.held(WAIT):
        _settle(folder, lock.left.get("plan"))
        yield Writing(folder, lock)


def folder_lock(folder: Path) -> Lock:
    return Lock(folder / LOCK_NAME, str(folder))


def recover(folder: Path) -> None:
    """End what processes that died had begun in a folder, where it is known and may be done."""
    clear(folder, OWN)
    if os.path.lexists(folder / LOCK_NAME):
        lock = folder_lock(folder)
        with contextlib.suppress(BundleError, OSError), lock.held():
            _settle(folder, lock.left.get("plan"))


def _settle(folder: Path, plan: Any) -> None:
    """Remove what a plan has put in place, or, where its head is there, what it left to remove."""
    if not isinstance(plan, dict) or not is_inside(plan.get("head")):
        return
    head = folder / plan["head"]
    whole = head.is_file() and hashlib.sha256(head.read_bytes()).hexdigest() == plan.get("sha256")
    names, folders = plan.get("removed" if whole else "placed"), plan.get("folders")
    if not isinstance(names, dict) or not isinstance(folders, list):
        return
    for name, number in names.items():
        path = folder / name
        # Not through a link that leads out.
        inside = is_inside(name) and path.parent.resolve().is_relative_to(folder.resolve())
        if not inside:
            continue
        if os.path.lexists(path) and os.lstat(path).st_ino == number:
            remove(path)
        for parent in itertools.takewhile(lambda x: x != folder, path.parents if whole else ()):
            with contextlib.suppress(OSError):
                parent.rmdir()
    for name in reversed([] if whole else list(filter(is_inside, folders))):
        with contextlib.suppress(OSError):
            (folder / name).rmdir()
