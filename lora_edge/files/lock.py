"""A lock file: held by the kernel while its process lives, and naming that process to others.

The kernel's lock (``flock``; on Windows a locked byte) ends with its process, whatever ends it, and
is seen by every process and container of the machine, on NFS by other machines too. Where a file
system has no such locks, or keeps them to one machine, the record in the file decides: host, boot,
process and when it was last touched. Knows nothing of what is locked.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_edge.errors import BundleError
from lora_edge.files.json import MAX_BYTES, parse_object
from lora_edge.files.owner import Owner

STALE = 600.0
"""Seconds after which a lock of another machine that nobody touches is taken for left behind."""

_BEAT = 60.0  # seconds between touches of a lock that is held for long
_PAUSE = 0.02  # seconds between attempts
_TRIES = 100  # attempts in which the file may be another one each time
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_FAR = 1 << 30  # on Windows a locked byte cannot be read: one behind the record's end


class Lock:
    """A lock file, which exists while it is held, or was left by a process that died.

    Args:
        path: the file.
        what: what is locked, for messages.
        stale: seconds without a touch after which another machine's lock is taken over.
        beat: touch the file once a minute: for a lock that is held for long.

    Attributes:
        left: what the process that died had noted in it; empty where none died.
    """

    def __init__(self, path: Path, what: str, *, stale: float = STALE, beat: bool = False) -> None:
        self.path = path
        self.left: Mapping[str, Any] = {}
        self._what = what
        self._stale = stale
        self._beats = beat
        self._stop = threading.Event()
        self._file = -1
        self._record: dict[str, Any] = {}

    def acquire(self, wait: float = 0.0) -> None:
        """Take the lock, or take it over from a process that died.

        Args:
            wait: seconds to wait for a process that holds it.

        Raises:
            BundleError: it is held; the message names the holder.
            OSError: the file cannot be written.
        """
        until, tries = time.monotonic() + wait, 0
        while (held := self._attempt()) is not None:
            tries += 1
            if time.monotonic() >= until and (held or tries > _TRIES):
                raise self._refusal(held)
            time.sleep(_PAUSE)
        if self._beats:
            threading.Thread(target=self._beat, daemon=True).start()

    def note(self, facts: Mapping[str, Any]) -> None:
        """Write ``facts`` beside the holder's name, durably: who takes it over finds them.

        They replace what was noted before.
        """
        self._write(self._record | dict(facts))
        os.fsync(self._file)

    def release(self) -> None:
        """Remove the file and let go of it."""
        self._stop.set()
        file, self._file = self._file, -1
        if os.name == "posix":
            # While it is held: who waits for it sees that the file is another one, or none.
            with contextlib.suppress(OSError):
                if _is_at(file, self.path):  # the folder around it may have been replaced
                    os.unlink(self.path)
            os.close(file)
        else:
            os.close(file)
            with contextlib.suppress(OSError):  # another process has it open
                os.unlink(self.path)

    @contextlib.contextmanager
    def held(self, wait: float = 0.0) -> Iterator[Lock]:
        """Hold the lock in a block; raises as :meth:`acquire`."""
        self.acquire(wait)
        try:
            yield self
        finally:
            self.release()

    def _attempt(self) -> Mapping[str, Any] | None:
        """``None``: it is ours; an empty record: try again at once; else who holds it."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = os.open(self.path, flags, 0o666)
        try:
            locked = _locked(file)
            if locked is False:
                return _read(file) or {"pid": 0}
            if not _is_at(file, self.path):
                return {}
            record = _read(file)
            if record and not self._is_over(record, known=locked is True):
                return record
            self._file, self._record = file, self._own()
            try:
                self._write(record | self._record)  # what was noted stays until something else is
            except OSError:
                file = -1
                self.release()
                raise
            if locked is None and _read(file).get("token") != self._record["token"]:
                return record  # another process was faster
            self.left, file = record, -1
            return None
        finally:
            if file >= 0:
                os.close(file)

    def _own(self) -> dict[str, Any]:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        return asdict(Owner.this()) | {"token": uuid.uuid4().hex, "since": since}

    def _is_over(self, record: Mapping[str, Any], *, known: bool) -> bool:
        """Whether the holder that a record names has ended.

        Args:
            record: what the file says.
            known: the kernel has given the lock to us.
        """
        owner = Owner.read(record)
        if owner is not None and owner.on_this_machine():
            if known:
                return True
            running = owner.is_running()
            if running is not None:
                return not running
        return self._age() > self._stale

    def _age(self) -> float:
        if math.isinf(self._stale):
            return 0.0
        # By the clock of the machine that keeps the files.
        with tempfile.TemporaryFile(dir=self.path.parent) as probe:
            return os.fstat(probe.fileno()).st_mtime - self.path.stat().st_mtime

    def _write(self, record: Mapping[str, Any]) -> None:
        # Over the old record in one call: at no time is there none.
        text = json.dumps(record).encode().ljust(os.fstat(self._file).st_size)
        os.lseek(self._file, 0, os.SEEK_SET)
        if os.write(self._file, text) != len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _refusal(self, held: Mapping[str, Any]) -> BundleError:
        owner = Owner.read(held)
        who = "another process" if owner is None else f"{owner}, since {held.get('since')}"
        after = "" if math.isinf(self._stale) else f", or wait {self._stale / 60:.0f} minutes"
        return BundleError(
            f"{self._what} is being written by {who}",
            f"Wait until it has ended. If it was ended by force on another machine, remove "
            f"{self.path}{after}.",
        )


def _locked(file: int) -> bool | None:
    """Whether the kernel gave the lock to us; ``None`` where it has none for this file."""
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            os.lseek(file, _FAR, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError as error:
        return None if error.errno in _NO_LOCKS else False
    return True


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _read(file: int) -> dict[str, Any]:
    """The record; empty where there is none that can be read: its writer did nothing yet."""
    try:
        os.lseek(file, 0, os.SEEK_SET)
        return parse_object(os.read(file, MAX_BYTES), "a lock", BundleError, "")
    except (OSError, BundleError):
        return {}
