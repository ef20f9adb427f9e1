"""What a process takes of the memory."""

from __future__ import annotations

from pathlib import Path

_SELF = Path("/proc/self")
_KEYS = {"smaps_rollup": {"Pss": "pss", "Pss_Anon": "private"}, "status": {"VmHWM": "peak"}}


def memory() -> dict[str, int]:
    """Bytes of this process; empty where the system does not tell, which is anywhere but on Linux.

    ``pss``: its share of what it shares with others; ``private``: the part of it that no file
    holds, which the system cannot drop; ``peak``: the most that was resident.
    """
    found = {}
    for file, names in _KEYS.items():
        path = _SELF / file
        if path.is_file():
            for line in path.read_text(encoding="ascii", errors="replace").splitlines():
                key, _, value = line.partition(":")
                if key in names:
                    found[names[key]] = int(value.split()[0]) * 1024
    return found
