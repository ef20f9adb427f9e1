"""``ci/crash``, short: a kill of each verb, pairs of commands at once, a disk without room."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.support.paths import ROOT


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="forks processes with PyTorch in them")
def test_nothing_is_broken_by_a_crash() -> None:
    options = ["--points", "8", "--races", "2", "--rooms", "1", "--seed", "1"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "ci" / "crash.py", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    kills = {row[0]: sum(map(int, row[2:4])) for row in rows if len(row) == 5 and row[1].isdigit()}
    assert {"export", "add", "remove", "golden", "validate", "train"} <= kills.keys()
    assert re.search(r"^broken: 0$", done.stdout, re.MULTILINE)
