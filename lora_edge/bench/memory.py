"""What a process takes of the memory."""

from __future__ import annotations

from pathlib import Path

_SELF = Path("/proc/self")


def memory() -> dict[str, int]:
    """Bytes of this process: ``pss`` (its share of what it shares with others) and ``peak`` (the
    most that was resident); empty where the system does not tell, which is anywhere but on Linux.
    """
    found = {}
    for file, key, name in (("smaps_rollup", "Pss:", "pss"), ("status", "VmHWM:", "peak")):
        path = _SELF / file
        if path.is_file():
            for line in path.read_text(encoding="ascii", errors="replace").splitlines():
                if line.startswith(key):
                    found[name] = int(line.split()[1]) * 1024
    return found
