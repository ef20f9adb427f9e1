"""Which process, of which start of which machine: so that what a dead one left can be told.

Knows the operating system; knows nothing of files that are written.
"""

from __future__ import annotations

import os
import platform
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Owner:
    """A process.

    Attributes:
        host: name and hardware address of its machine, or container.
        boot: id of the kernel's start, which all containers of a machine share; empty where the
            system has none.
        space: its namespace of process ids; empty where the system has none.
        pid: its id in that namespace.
        started: when it began, in the kernel's own count; 0 where that is not known.
    """

    host: str
    boot: str
    space: str
    pid: int
    started: int

    @staticmethod
    def this() -> Owner:
        """The process that asks."""
        boot = _BOOT.read_text().strip() if _BOOT.is_file() else ""
        space = os.readlink("/proc/self/ns/pid") if os.path.islink("/proc/self/ns/pid") else ""
        host = f"{platform.node()}/{uuid.getnode():012x}"
        return Owner(host, boot, space, os.getpid(), _started(os.getpid()))

    @staticmethod
    def read(record: Mapping[str, Any]) -> Owner | None:
        """An owner from JSON; ``None`` where it names none."""
        texts = [record.get(name) for name in ("host", "boot", "space")]
        numbers = [record.get(name) for name in ("pid", "started")]
        if any(type(x) is not str for x in texts) or any(type(x) is not int for x in numbers):
            return None
        return Owner(*texts, *numbers)  # type: ignore[arg-type]

    def on_this_machine(self) -> bool:
        """It ran under the kernel that runs now, so that a lock of that kernel tells of it."""
        here = Owner.this()
        return self.boot == here.boot if self.boot or here.boot else self.host == here.host

    def is_running(self) -> bool | None:
        """Whether it runs; ``None`` where that cannot be told from here."""
        here = Owner.this()
        if not self.on_this_machine() or self.space != here.space or os.name != "posix":
            return None
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            return True
        return self.started in {0, _started(self.pid)}

    def __str__(self) -> str:
        """For people."""
        return f"process {self.pid} on {self.host.partition('/')[0]}"


def _started(pid: int) -> int:
    try:
        # The second field, the command's name, may hold blanks and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return int(fields[19])
    except (OSError, ValueError, IndexError):
        return 0
