"""Compiles the native library into the user's cache, and proves it there before it is used.

Needs a C++17 compiler that knows GCC's vectors (GCC, Clang), and no headers: what is used of ONNX
Runtime is declared in ``abi.h``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import onnxruntime as ort

from lora_edge.errors import LoraEdgeError, MissingDependencyError
from lora_edge.runtime.native.check import check_sums
from lora_edge.runtime.native.library import SOURCES, library_file

Progress = Callable[[str], None]

_OLDEST = (1, 24)  # of ONNX Runtime: it tells sizes without a copy, and saves such graphs
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fvisibility=hidden")
# Instructions of this processor; a compiler for another kind of processor names them otherwise.
_OWN = (("-march=native",), ("-mcpu=native",), ())
_LONGEST = 300  # seconds


def find_compiler(given: str | None = None) -> str:
    """Path of a C++ compiler: the given one, ``CXX``, or the first of c++, g++ and clang++.

    Raises:
        MissingDependencyError: there is none.
    """
    wanted = given or os.environ.get("CXX")
    names = [wanted] if wanted else list(_COMPILERS)
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise MissingDependencyError(
            f"no C++ compiler was found; looked for {', '.join(names)}",
            "Install GCC or Clang, or name one: --compiler PATH. lora-edge works without it.",
        )
    return found


def check_release() -> None:
    """Refuse a release of ONNX Runtime that has not what the library needs.

    Raises:
        MissingDependencyError: it is too old.
    """
    release = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if release < _OLDEST:
        raise MissingDependencyError(
            f"ONNX Runtime is {ort.__version__}, the native library needs "
            f"{'.'.join(map(str, _OLDEST))} or later",
            "Upgrade onnxruntime. lora-edge works without the library.",
        )


def build(compiler: str | None = None, say: Progress = lambda _: None) -> Path:
    """Compile the library, compare what it computes with numpy, and keep it.

    Args:
        compiler: name or path; None: see :func:`find_compiler`.
        say: called with a line for each thing that was found or done.

    Returns:
        The library's file; one that was there before is replaced.

    Raises:
        MissingDependencyError: there is no compiler, it does not take the source, or ONNX Runtime
            is too old.
        ParityError: the library computes something else than numpy, and is not kept.
        OSError: the user's cache cannot be written.
    """
    check_release()
    found = find_compiler(compiler)
    say(f"compiler: {found}; no headers are needed")
    target = library_file()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as made:
            file = Path(made) / target.name
            say(f"compiled with {_compile(found, file)}")
            worst = check_sums(file)
            say(f"{worst.cases} sums agree with numpy; the worst is off by {worst.error:.1e}")
            os.replace(file, target)
    except LoraEdgeError:
        if not target.exists():
            shutil.rmtree(target.parent, ignore_errors=True)
        raise
    _drop_others(target)
    return target


def _compile(compiler: str, file: Path) -> str:
    """Compile into a file; returns the flags."""
    source = Path(__file__).parent / SOURCES[0]
    said = ""
    for own in _OWN:
        flags = [*_FLAGS, *own]
        done = _run([compiler, *flags, str(source), "-o", str(file)])
        if done is None:
            return " ".join(flags)
        said = said or done
    raise MissingDependencyError(
        f"{compiler} does not compile {source.name}: {said}",
        "Use another GCC or Clang: --compiler PATH. lora-edge works without it.",
    )


def _run(command: Sequence[str]) -> str | None:
    """None if a command succeeds; else what it says first."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_LONGEST, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if not done.returncode:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), next(iter(lines), "no reason given"))


def _drop_others(target: Path) -> None:
    """Remove libraries of other processors, releases and sources: nobody would find them."""
    for folder in target.parent.parent.iterdir():
        if folder != target.parent:
            shutil.rmtree(folder, ignore_errors=True)
