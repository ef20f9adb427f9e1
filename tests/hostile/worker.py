"""Reads mutants, one after the other, within limits; says of each how it ended.

Started by ``__main__``: a case's name comes on stdin, a line of JSON goes to stdout.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from random import Random
from typing import Any

from lora_edge.errors import LoraEdgeError
from tests.hostile import kinds

SECONDS = 5
MEMORY = 1 << 30
OWN = f"{os.sep}lora_edge{os.sep}"

_WRITES = {
    "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate",
    "os.chmod", "os.utime", "shutil.rmtree", "shutil.move", "tempfile.mkstemp", "tempfile.mkdtemp",
}  # fmt: skip
_NEVER = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"}


class Guard:
    """Notes what is done outside of a folder."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.found: list[str] = []
        sys.addaudithook(self._event)

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in _NEVER:
            self.found.append(f"{event} {arguments[:1]!r}")
            return
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            paths = [path] if writes and isinstance(path, str | bytes) else []
        elif event in _WRITES:
            paths = [x for x in arguments[:2] if isinstance(x, str | bytes) and len(x) > 0]
        else:
            return
        for path in paths:
            below = arguments[-1]  # shutil.rmtree names what is in a folder that it has open
            if event in ("os.remove", "os.rmdir") and isinstance(below, int) and below >= 0:
                folder = os.readlink(f"/proc/self/fd/{below}")
            else:
                folder = os.getcwd()
            full = os.path.realpath(os.path.join(folder, os.fsdecode(path)))
            if not full.startswith(self.folder) and full != os.devnull:
                self.found.append(f"{event} {full}")


def limits() -> None:
    """Of the processor's time and of memory, from now on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def without_limits() -> None:
    """So that what is done between cases is not counted."""
    for what in (resource.RLIMIT_CPU, resource.RLIMIT_AS):
        resource.setrlimit(what, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def prepared(case: str, seed: int, home: Path) -> tuple[kinds.Kind, Path, str]:
    """The folder of a case, with a mutant in it."""
    name, _, number = case.partition(":")
    kind = kinds.KINDS[name]
    folder = home / "cases" / f"case-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(home / "seeds" / kind.family, folder, copy_function=os.link)
    if number == "whole":
        return kind, folder, ""
    return kind, folder, kinds.damage(kind, Random(f"{seed} {case}"), folder)


def outcome(kind: kinds.Kind, folder: Path, guard: Guard) -> dict[str, Any]:
    """How the reading of a folder ended."""
    tempfile.tempdir = str(folder)
    limits()
    guard.folder, guard.found = str(folder.resolve()), []
    fault = error = ""
    try:
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
            kind.read(folder)
    except LoraEdgeError as refusal:
        error = f"{type(refusal).__name__}: {refusal}"
        if not refusal.hint:
            fault = f"no hint: {error}"
    except MemoryError:
        fault = "more than 1 GB"
    except BaseException as other:  # noqa: BLE001  PanicException is one
        places = [x for x in traceback.extract_tb(other.__traceback__) if OWN in x.filename]
        at = f"{Path(places[-1].filename).name}:{places[-1].name}" if places else "?"
        fault = f"{type(other).__name__} in {at}: {other}"
    finally:
        guard.folder = None
        without_limits()
    if not fault and not error and kind.oracle is not None:
        fault = kind.oracle(folder)
    if guard.found:
        fault = f"touched what is outside: {guard.found[0]}"
    return {"fault": fault[:400], "error": error[:400]}


@functools.cache
def warm(name: str, home: Path) -> None:
    """Read what is whole, so that all is imported; it has to be accepted."""
    kind, folder, _ = prepared(f"{name}:whole", 0, home)
    refusals = (LoraEdgeError,) if kind.family == "data" else ()  # each reader reads each file
    with (
        contextlib.redirect_stdout(None),
        contextlib.redirect_stderr(None),
        contextlib.suppress(*refusals),
    ):
        kind.read(folder)


def main() -> None:
    """Answer until stdin ends."""
    home, seed = Path(sys.argv[1]), int(sys.argv[2])
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    guard = Guard()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what C libraries print
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        case = line.strip()
        try:
            warm(case.partition(":")[0], home)
        except BaseException:
            print(json.dumps({"broken": traceback.format_exc()}), file=answers, flush=True)
            raise
        kind, folder, file = prepared(case, seed, home)
        found = outcome(kind, folder, guard)
        print(json.dumps({"case": case, "file": file, **found}), file=answers, flush=True)


if __name__ == "__main__":
    main()
