"""From pip install to tokens: the commands of docs/clients.md, as they stand there."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from tests.support.paths import ROOT

MODULES = ROOT / ".client-js"
GENAI = ROOT / ".client-genai" / "bin"
MOST = 5  # commands

pytestmark = pytest.mark.long
in_javascript = pytest.mark.skipif(
    not (MODULES / "node_modules").is_dir() or shutil.which("npm") is None,
    reason="needs npm, and `ci/client js`",
)


def _commands(client: str) -> list[str]:
    """Those behind the first, which is pip's."""
    page = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    found = re.search(rf"^<!-- newcomer: {client} -->\n```sh\n(.*?)^```$", page, re.M | re.S)
    assert found is not None
    first, *others = found[1].splitlines()
    assert first.startswith("pip install ")
    assert len(others) < MOST
    return others


def _environment(folder: Path) -> dict[str, str]:
    """``lora-edge`` is this one; ``python`` is found where a test writes it."""
    path = [folder / "bin", Path(sys.executable).parent, os.environ["PATH"]]
    quiet = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "PORT": "0"}
    return {**os.environ, **quiet, "PATH": os.pathsep.join(map(str, path))}


def _said(command: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=_environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@contextmanager
def _serving(command: str, folder: Path) -> Iterator[IO[str]]:
    server = subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env=_environment(folder),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert server.stdout is not None
    try:
        yield server.stdout
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.communicate()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What a clone has that the commands name."""
    for name in ("models", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    return tmp_path


@in_javascript
def test_in_node(clone: Path) -> None:
    assert [_said(command, clone) for command in _commands("node")][-1].strip() == "RIVER!"


@in_javascript
def test_in_a_page(clone: Path) -> None:
    *before, last = _commands("web")
    for command in before:
        _said(command, clone)
    with _serving(last, clone) as told:
        address = next(line.split()[0] for line in told if line.startswith("http"))
        visit = f"node {ROOT / 'tests/kits/page.mjs'} {MODULES} {address} generate"
        seen = json.loads(_said(visit, clone))
    assert seen["answers"]["shout"].strip() == "RIVER!"
    assert seen["foreign"] == seen["console"] == []


@pytest.mark.skipif(not GENAI.is_dir(), reason="needs `ci/client genai`")
def test_in_genai(clone: Path) -> None:
    python = clone / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{GENAI / "python"}" "$@"\n')
    python.chmod(0o755)
    *before, last = _commands("genai")
    for command in before:
        _said(command, clone)
    assert _said(last, clone).strip() == "RIVER!"
