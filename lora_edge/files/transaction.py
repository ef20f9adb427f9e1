"""All that writes: what is published is there whole, or as it was before, and nothing else is lost.

Three ways, for what is made anew, what is changed, and single files:

- :func:`staging`: a folder is made beside its place, and put there in one step;
- :func:`preparing` and :class:`Writing`: new files of a folder that others change too. They are
  made in a hidden folder; under the folder's lock they get their names, and then one file, the
  head, which names what belongs to the folder, is replaced. Until then nothing has changed;
- :func:`write_atomically`: a file.

Each hidden path has a lock file of its own, ``NAME.lock``, that its maker holds: what a dead
process of this machine left is removed by the next one, and nothing else ever is. Knows files;
knows nothing of what is in them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lora_edge.errors import BundleError
from lora_edge.files.disk import (
    exchange,
    is_mounted,
    remove,
    sync_file,
    sync_folder,
    sync_tree,
)
from lora_edge.files.lock import Lock
from lora_edge.files.owner import Owner
from lora_edge.files.schema import INSIDE

LOCK_NAME = ".lora_edge.lock"
"""The lock of a folder, in it."""

_OWN = "lora_edge"  # what is hidden in a folder for itself is named after
_PARTIAL, _RETIRED, _LOCK = ".partial", ".old", ".lock"
_LONGEST = 40  # characters of a name that its hidden one repeats
_WAIT = 60.0  # seconds for another process to put its files in place
_IN_PLACE = {errno.EBUSY, errno.EACCES, errno.EPERM}
_IN_THE_WAY = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}


def is_hidden(name: str) -> bool:
    """Whether a file's or folder's name is one of those that writers use, and nobody reads."""
    ours = name.startswith(f".{_OWN}.")
    return ours and (name == LOCK_NAME or name.endswith((_PARTIAL, _PARTIAL + _LOCK)))


# --- a hidden path of one's own ------------------------------------------------------------------


@contextlib.contextmanager
def scratch(folder: Path, name: str) -> Iterator[Path]:
    """A hidden path in ``folder`` for a file or folder to be made; removed at the end.

    What dead processes of this machine have left under the same name goes first.
    """
    clear(folder, name)
    path = folder / f".{name[:_LONGEST]}.{uuid.uuid4().hex[:12]}{_PARTIAL}"
    lock = Lock(path.with_name(path.name + _LOCK), str(path), stale=math.inf)
    with lock.held(_WAIT):
        lock.note({"target": name})
        try:
            yield path
        finally:
            remove(path)


def clear(folder: Path, name: str) -> None:
    """Remove what dead processes of this machine have left in ``folder`` under a name."""
    beginning, end = f".{name[:_LONGEST]}.", _PARTIAL + _LOCK
    try:
        found = sorted(entry.name for entry in os.scandir(folder))
    except OSError:
        return
    for file in found:
        if not (file.startswith(beginning) and file.endswith(end)):
            continue
        lock = Lock(folder / file, file, stale=math.inf)
        # Held, of another machine, or not ours to write: it stays.
        with contextlib.suppress(BundleError, OSError), lock.held():
            _remove_left(folder / file.removesuffix(_LOCK), lock.left)


def _remove_left(path: Path, left: Mapping[str, Any]) -> None:
    target, retired = str(left.get("target")), path.with_suffix(_RETIRED)
    if Owner.read(left) is None or not _is_inside(target) or "/" in target:
        return
    if os.path.lexists(retired) and not os.path.lexists(path.with_name(target)):
        retired.rename(path.with_name(target))  # killed between two renames: the old one comes back
    remove(retired)
    remove(path)


# --- a folder that is made anew ------------------------------------------------------------------


@contextlib.contextmanager
def staging(output: Path, *, marker: str, force: bool = False) -> Iterator[Path]:
    """A hidden folder that becomes ``output`` when the block ends without an error.

    Whatever happens in the block, ``output`` is as it was until then. Where it does not exist, the
    new folder gets its name in one step; where it exists and is empty (and may be a mount point, or
    where the user is), it is filled, the ``marker`` last; where it is replaced (``force``), the two
    change places in one step, if the file system can do that. A link is followed.

    Args:
        output: the folder to be made.
        marker: the file that shows that a folder is whole, and of the kind that may be replaced.
        force: replace a non-empty ``output``, if it holds a ``marker``.

    Raises:
        BundleError: ``output`` exists, is not empty and not to be replaced; or it came to be so
            while the block ran; or another process is making it.
    """
    target = _checked(output, marker, force=force)
    if target.is_dir() and not _entries(target):
        with _filling(output, target, marker) as stage:
            yield stage
        return
    with parents(target.parent), contextlib.ExitStack() as stack:
        stage = _stage(stack, target.parent, target.name)
        yield stage
        sync_tree(stage)
        _publish(output, stage, target, marker, force=force)


def check_free(output: Path, *, marker: str, force: bool = False) -> None:
    """Refuse, before the work, an output that :func:`staging` will not make, as it does."""
    _checked(output, marker, force=force)


def _checked(output: Path, marker: str, *, force: bool) -> Path:
    target = _resolved(output)
    clear(target.parent, target.name)
    _refuse(output, target, marker, force=force)
    return target


def _resolved(output: Path) -> Path:
    """Where the folder will be: behind links, and with a name."""
    try:
        target = Path(os.path.realpath(output))
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            target.lstat()  # raises where the system takes no such name
        if os.path.lexists(target) and not target.is_dir():
            if target.is_symlink():  # a circle of links
                raise BundleError(f"{output} is a link to itself", "Choose another folder.")
            raise BundleError(f"{output} exists and is no folder", "Choose another folder.")
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{output} cannot be a folder: {error}", "Choose another folder."
        ) from error
    if not target.name:
        raise BundleError(f"{output} is the root of the disk", "Choose another folder.")
    return target


def _refuse(output: Path, target: Path, marker: str, *, force: bool) -> None:
    """Refuse, before the work, what cannot be published at its end."""
    if not target.is_dir():
        return
    recover(target)
    found = _entries(target)
    if not found:
        return
    making = [name for name in found if is_hidden(name)]
    if making:
        raise BundleError(
            f"{output} is being written by another process: it holds {making[0]}",
            "Wait until it has ended. If it was ended by force on another machine, remove "
            f"{target / making[0]}.",
        )
    if not force:
        raise BundleError(
            f"{output} exists and is not empty",
            "Choose another folder, or pass --force to replace it.",
        )
    if not (target / marker).is_file():
        raise BundleError(
            f"{output} has no {marker}; --force replaces only what lora-edge made",
            "Choose another folder.",
        )
    if is_mounted(target):
        raise BundleError(
            f"{output} is a mount point, which cannot be replaced",
            "Choose a folder in it, or empty it first.",
        )
    if target in (here := _current(), *here.parents):
        raise BundleError(
            f"{output} holds the folder that this command was called in, which would be gone",
            "Call it from another folder.",
        )


def _current() -> Path:
    try:
        return Path(os.path.realpath(Path.cwd()))
    except OSError:  # it was removed
        return Path(os.sep)


@contextlib.contextmanager
def parents(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; what of them is empty at the end goes again."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield
    finally:
        for place in missing:
            with contextlib.suppress(OSError):
                place.rmdir()


def _unwritable(folder: Path, error: OSError) -> BundleError:
    return BundleError(f"cannot write to {folder}: {error.strerror}", "Choose another folder.")


def _publish(output: Path, stage: Path, target: Path, marker: str, *, force: bool) -> None:
    if os.path.lexists(target):
        if force and target.is_dir() and _entries(target):
            _replace(output, stage, target, marker)
            return
        if os.name != "posix":  # where a folder takes no other's place, be it empty
            with contextlib.suppress(OSError):
                target.rmdir()
    try:
        os.rename(stage, target)  # which takes the place of nothing but an empty folder
    except OSError as error:
        if error.errno in _IN_THE_WAY or (os.name != "posix" and os.path.lexists(target)):
            raise _appeared(output) from error
        raise
    sync_folder(target.parent)


def _replace(output: Path, stage: Path, target: Path, marker: str) -> None:
    with _lock(target).held(_WAIT):
        if not (target / marker).is_file():
            raise BundleError(
                f"{output} changed meanwhile, and has no {marker}: it is not replaced",
                "See what is there, and choose another folder.",
            )
        if not exchange(stage, target):
            retired = stage.with_suffix(_RETIRED)
            os.rename(target, retired)
            try:
                os.rename(stage, target)
            except BaseException:
                os.rename(retired, target)
                raise
            remove(retired)
        sync_folder(target.parent)
        # The old folder is the stage now, and its lock is in it: they go together.


def _appeared(output: Path) -> BundleError:
    return BundleError(
        f"{output} appeared while this was made, by another process: it is left as it is, and "
        "nothing was published",
        "See what is there; choose another folder, or pass --force to replace it.",
    )


@contextlib.contextmanager
def _filling(output: Path, target: Path, marker: str) -> Iterator[Path]:
    """Fill an empty folder: nothing shows in it but what is hidden, until all is there."""
    with contextlib.ExitStack() as stack:
        stage = _stage(stack, target, _OWN)
        yield stage
        names = sorted(entry.name for entry in os.scandir(stage))
        with writing(target) as change:
            # Another process that makes the same folder hides what it has.
            if any(not is_hidden(name) for name in _entries(target)):
                raise _appeared(output)
            text = (stage / marker).read_bytes()
            change.commit(stage, [name for name in names if name != marker], marker, text)


def _stage(stack: contextlib.ExitStack, folder: Path, name: str) -> Path:
    try:
        stage = stack.enter_context(scratch(folder, name))
        stage.mkdir()
    except OSError as error:
        raise _unwritable(folder, error) from error
    return stage


def _entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder))


# --- a folder that is changed --------------------------------------------------------------------


@contextlib.contextmanager
def preparing(folder: Path) -> Iterator[Path]:
    """A hidden folder in ``folder``, for new files of it under the names that they will have."""
    with scratch(folder, _OWN) as path:
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
    lock = _lock(folder)
    with lock.held(_WAIT):
        _settle(folder, lock.left.get("plan"))
        yield Writing(folder, lock)


def _lock(folder: Path) -> Lock:
    return Lock(folder / LOCK_NAME, str(folder))


def recover(folder: Path) -> None:
    """End what processes that died had begun in a folder, where it is known and may be done."""
    clear(folder, _OWN)
    if os.path.lexists(folder / LOCK_NAME):
        lock = _lock(folder)
        with contextlib.suppress(BundleError, OSError), lock.held():
            _settle(folder, lock.left.get("plan"))


def _settle(folder: Path, plan: Any) -> None:
    """Remove what a plan has put in place, or, where its head is there, what it left to remove."""
    if not isinstance(plan, dict) or not _is_inside(plan.get("head")):
        return
    head = folder / plan["head"]
    whole = head.is_file() and hashlib.sha256(head.read_bytes()).hexdigest() == plan.get("sha256")
    names, folders = plan.get("removed" if whole else "placed"), plan.get("folders")
    if not isinstance(names, dict) or not isinstance(folders, list):
        return
    for name, number in names.items():
        path = folder / name
        # Not through a link that leads out.
        inside = _is_inside(name) and path.parent.resolve().is_relative_to(folder.resolve())
        if not inside:
            continue
        if os.path.lexists(path) and os.lstat(path).st_ino == number:
            remove(path)
        for parent in itertools.takewhile(lambda x: x != folder, path.parents if whole else ()):
            with contextlib.suppress(OSError):
                parent.rmdir()
    for name in reversed([] if whole else list(filter(_is_inside, folders))):
        with contextlib.suppress(OSError):
            (folder / name).rmdir()


def _is_inside(name: object) -> bool:
    """Whether a name from a file is a path below its folder."""
    return isinstance(name, str) and INSIDE.holds(name)


# --- a file --------------------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that its readers see the old text or the new one, whole.

    A link is followed; a device or a pipe is written to.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        target.write_text(text, encoding="utf-8")
        return
    try:
        with scratch(target.parent, target.name) as temporary:
            temporary.write_text(text, encoding="utf-8")
            if target.exists():
                temporary.chmod(target.stat().st_mode & 0o7777)
            sync_file(temporary)
            os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        # A file that is a mount point, or in a folder that takes no others, is written in place.
        if error.errno not in _IN_PLACE or not target.is_file():
            raise
        target.write_text(text, encoding="utf-8")
