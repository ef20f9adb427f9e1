"""Readers that go before the work is done."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import sys, click
from lora_edge.cli.streams import unheard
with unheard(goes_on={goes_on}):
    try:
        for _ in range(3):
            click.echo("x" * 100_000)
            click.echo("said", err=True)
    except click.exceptions.Exit:
        sys.exit(7)
    sys.exit(5)
"""


def _run(code: str, **streams: int) -> int:
    return subprocess.run([sys.executable, "-c", code], check=False, **streams).returncode  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(("goes_on", "expected"), [(True, 5), (False, 7)])
def test_a_pipe_that_nobody_reads(goes_on: bool, expected: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert _run(CODE.format(goes_on=goes_on), stdout=writer, stderr=writer) == expected
    os.close(writer)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="asks Linux for a full disk")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_under_stderr_changes_no_verdict_and_under_stdout_is_an_error(
    unbuffered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    full = os.open("/dev/full", os.O_WRONLY)
    code = CODE.format(goes_on=True)
    assert _run(code, stdout=subprocess.DEVNULL, stderr=full) == 5
    command = [sys.executable, "-m", "lora_edge", "--help"]
    done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    first, second = done.stderr.splitlines()
    assert "No space left" in first
    assert second.startswith("hint: ")
    os.close(full)


def test_streams_that_were_closed_from_the_start() -> None:
    command = f'exec "{sys.executable}" -m lora_edge --help >&- 2>&-'
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 0
