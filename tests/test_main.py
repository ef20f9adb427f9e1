"""Ctrl-C while the command is being loaded: one line, and exit code 130."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

# Interrupts the process at the moment in which it begins to import a module.
INTERRUPT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = ["lora-edge", "inspect", "nothing"]
from {start} import main
main()
"""


@pytest.mark.parametrize("module", ["click", "lora_edge.cli", "lora_edge.cli.inspect"])
def test_an_interrupt_is_one_line(module: str) -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    start = pyproject.partition('lora-edge = "')[2].partition(":")[0]
    code = INTERRUPT.format(module=module, start=start)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "interrupted; nothing was left behind"
    assert (done.returncode, done.stdout) == (130, "")


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_an_ignored_interrupt_stays_ignored() -> None:
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + INTERRUPT.format(
        module="click", start="lora_edge.__main__"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "nothing" in done.stderr
