"""``python -m tests.hostile --count 2000``: mutants of every kind of file, read within limits.

Each mutant is refused by a LoraEdgeError with a hint, or accepted; within 5 s of the processor and
1 GB of memory, and without touching anything outside of its folder. Prints a line for each kind,
then each fault once with its count; exit code 1 if there is any. A case is made again from its
name: ``python -m tests.hostile --case manifest:123``.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import queue
import re
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tests.hostile import kinds, seeds
from tests.support.paths import ROOT

WALL = 120  # seconds; of a worker that waits for something
RENEW = 1500  # cases that a worker reads


class Worker:
    """A process that reads mutants."""

    def __init__(self, home: Path, seed: int) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  the worker's, as long as it lives
        environment = {
            **os.environ,
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "ORT_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TMPDIR": str(home / "cases"),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.worker", str(home), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            cwd=ROOT,
            text=True,
            bufsize=1,
        )
        self.cases = 0
        if self._line(WALL * 2) != "ready":
            raise RuntimeError(f"a worker did not start:\n{self._said()}")

    def ask(self, case: str) -> dict[str, Any]:
        """How a case ended."""
        self.cases += 1
        assert self._process.stdin is not None
        self._process.stdin.write(f"{case}\n")
        self._process.stdin.flush()
        line = self._line(WALL)
        if line:
            answer = dict(json.loads(line))
            if "broken" in answer:
                raise RuntimeError(f"what is whole is not read, for {case}:\n{answer['broken']}")
            return answer
        self._process.kill()
        status = self._process.wait()
        fault = {-24: "more than 5 s", -9: "more than 5 s, waiting"}.get(
            status, f"the process died ({status})"
        )
        return {"case": case, "file": "", "error": "", "fault": fault, "dead": True}

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _line(self, seconds: float) -> str:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        return self._process.stdout.readline().strip() if ready else ""

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-4000:]


def _work(
    home: Path, seed: int, cases: queue.SimpleQueue[str], found: list[dict[str, Any]]
) -> None:
    worker = None
    while True:
        try:
            case = cases.get_nowait()
        except queue.Empty:
            break
        if worker is not None and worker.cases >= RENEW:
            worker.close()
            worker = None
        worker = worker or Worker(home, seed)
        answer = worker.ask(case)
        found.append(answer)
        if answer.get("dead"):
            worker = None
    if worker is not None:
        worker.close()


def run(count: int, seed: int, workers: int, only: list[str]) -> list[dict[str, Any]]:
    """Read so many mutants; how each ended, by name."""
    home = Path(tempfile.mkdtemp(prefix="lora-edge-hostile-"))
    try:
        (home / "seeds").mkdir()
        (home / "cases").mkdir()
        seeds.make(home / "seeds")
        outside = home / "outside"
        outside.write_text("untouched")
        cases: queue.SimpleQueue[str] = queue.SimpleQueue()
        names = (
            kinds.names(count)
            if not only
            else [f"{name}:{number}" for number in range(count // len(only)) for name in only]
        )
        for name in names:
            cases.put(name)
        found: list[dict[str, Any]] = []
        threads = [
            threading.Thread(target=_work, args=(home, seed, cases, found)) for _ in range(workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(found) != len(names):
            raise SystemExit(f"{len(names) - len(found)} cases were not read; a worker failed")
        left = {path.name for path in home.iterdir()}
        if left != {"seeds", "cases", "outside"} or outside.read_text() != "untouched":
            raise SystemExit(f"something was written outside: {left}")
        return sorted(found, key=lambda one: one["case"])
    finally:
        shutil.rmtree(home, ignore_errors=True)


def summary(found: list[dict[str, Any]], seconds: float) -> str:
    """A line for each kind, then each fault once."""
    lines = [f"{'kind':<18}{'mutants':>8}{'refused':>9}{'accepted':>9}{'faults':>8}"]
    counts = collections.Counter(one["case"].partition(":")[0] for one in found)
    for name, count in counts.items():
        own = [one for one in found if one["case"].startswith(f"{name}:")]
        faults = sum(bool(one["fault"]) for one in own)
        refused = sum(bool(one["error"]) and not one["fault"] for one in own)
        lines.append(f"{name:<18}{count:>8}{refused:>9}{count - refused - faults:>9}{faults:>8}")
    grouped: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        if one["fault"]:
            kind = one["case"].partition(":")[0]
            fault = re.sub(r"0x[0-9a-f]+|\d+|'[^']*'|\"[^\"]*\"", "…", one["fault"])[:100]
            grouped.setdefault(f"{kind}: {fault}", []).append(one)
    for same in sorted(grouped.values(), key=len, reverse=True):
        one = same[0]
        lines.append(f"FAULT x{len(same)} {one['case']} ({one['file']}): {one['fault']}")
    faults = sum(map(len, grouped.values()))
    lines.append(f"{len(found)} mutants, {faults} faults, {seconds:.0f} s")
    return "\n".join(lines)


def again(case: str, seed: int) -> None:
    """One case, in this process, with its traceback."""
    from tests.hostile import worker

    home = Path(tempfile.mkdtemp(prefix="lora-edge-hostile-"))
    (home / "seeds").mkdir()
    (home / "cases").mkdir()
    seeds.make(home / "seeds")
    kind, folder, file = worker.prepared(case, seed, home)
    print(f"{folder / file}")
    kind.read(folder)
    print("accepted")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kind", action="append", choices=list(kinds.KINDS), default=[])
    parser.add_argument("--case")
    given = parser.parse_args()
    if given.case:
        again(given.case, given.seed)
        return
    started = time.monotonic()
    found = run(given.count, given.seed, given.workers, given.kind)
    print(summary(found, time.monotonic() - started))
    sys.exit(any(one["fault"] for one in found))


if __name__ == "__main__":
    main()
