"""All that writes: what is published is there whole, or as it was before, and nothing else is lost.

Three ways, for what is made anew, what is changed, and single files:

- :func:`staging`: a folder is made beside its place, and put there in one step;
- :mod:`lora_edge.files.changing`: new files of a folder that others change too;
- :func:`write_atomically`: a file.

What is not whole yet lies in hidden paths (:mod:`lora_edge.files.hidden`). Knows files; knows
nothing of what is in them.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from lora_edge.errors import BundleError
from lora_edge.files.changing import folder_lock, recover, writing
from lora_edge.files.disk import (
    exchange,
    is_mounted,
    remove,
    sync_file,
    sync_folder,
    sync_tree,
)
from lora_edge.files.hidden import OWN, RETIRED, WAIT, clear, is_hidden, scratch

# What a folder is changed with can be had here too.

_IN_PLACE = {errno.EBUSY, errno.EACCES, errno.EPERM}
_IN_THE_WAY = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}


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
    with folder_lock(target).held(WAIT):
        if not (target / marker).is_file():
            raise BundleError(
                f"{output} changed meanwhile, and has no {marker}: it is not replaced",
                "See what is there, and choose another folder.",
            )
        if not exchange(stage, target):
            retired = stage.with_suffix(RETIRED)
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
        stage = _stage(stack, target, OWN)
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
