"""What ``from lora_edge import Runner`` costs beside the third-party packages that it imports.

Each is imported in a process of its own, in shuffled turns, the third-party packages twice; seconds
of the processor, and the ratio with its spread over the turns::

    .venv/bin/python ci/import_time.py
"""

from __future__ import annotations

import os
import random
import resource
import statistics
import subprocess
import sys

OURS = "from lora_edge import Runner"
_LIST = f"""
import sys
before = set(sys.modules)
{OURS}
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(new - set(sys.stdlib_module_names) - {{"lora_edge"}}), sep=",")
"""
TURNS = 15


def _seconds(code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Compiled modules are kept, as they are where a package is installed.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, "-c", code], check=True, env=kept)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    done = subprocess.run([sys.executable, "-c", _LIST], capture_output=True, text=True, check=True)
    third = f"import {done.stdout.strip()}"
    contestants = {"nothing": "pass", "third": third, "third again": third, "ours": OURS}
    _seconds(OURS)
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(TURNS):
        for name in random.sample(list(contestants), len(contestants)):
            found[name].append(_seconds(contestants[name]))
    print(f"{third}; {TURNS} turns")
    for name, seconds in found.items():
        print(f"{name:<12} {statistics.median(seconds):.3f} s")
    for name in ("third again", "ours"):
        ratios = sorted(own / other for own, other in zip(found[name], found["third"], strict=True))
        print(
            f"{name} / third: {statistics.median(ratios):.2f} "
            f"({ratios[TURNS // 4]:.2f} to {ratios[-TURNS // 4]:.2f})"
        )


if __name__ == "__main__":
    main()
