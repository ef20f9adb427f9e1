"""Mutants of every kind of file, some of ci/fuzz's: refused by name or right, and no harm done."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the limits are those of Linux: RLIMIT_AS, /proc"
)


def _fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.hostile", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_no_mutant_does_harm() -> None:
    done = _fuzz("--count", "250")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "250 mutants, 0 faults" in done.stdout


def _harms() -> dict[str, str]:
    """Name of each reader that does harm, and what has to be said of it."""
    tree = ast.parse((HERE / "harms.py").read_text(encoding="utf-8"))
    table = next(x.value for x in tree.body if isinstance(x, ast.AnnAssign))
    assert isinstance(table, ast.Dict)
    return {
        key.value: value.elts[1].value  # type: ignore[union-attr, attr-defined]
        for key, value in zip(table.keys, table.values, strict=True)
    }


@pytest.mark.slow
def test_each_harm_would_be_found() -> None:
    harms = _harms()
    done = _fuzz("--count", str(len(harms)), *(x for name in harms for x in ("--kind", name)))
    assert done.returncode == 1, done.stdout + done.stderr
    said = {line.split()[2].partition(":")[0]: line for line in done.stdout.splitlines()
            if line.startswith("FAULT")}  # fmt: skip
    assert set(said) == {name for name, words in harms.items() if words}
    for name, line in said.items():
        assert harms[name] in line, line
