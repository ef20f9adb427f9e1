"""``lora-edge validate --in``: what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.commands import Cli

PLAIN = "onnxruntime"


def test_the_command(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    found = cli("validate", bundle, "--in", PLAIN, "--quick", "--json", file)
    assert found.code == 0, found.err
    assert json.loads(file.read_text())["command"] == (
        f"lora-edge validate {bundle} --in onnxruntime --quick"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--in", "netscape"], "there is no client 'netscape'"),
        (["--in", "node", "--client", "node=/"], "/ has no node_modules"),
        (["--in", "openvino", "--client", "openvino=/no/python"], "/no/python cannot be started"),
        (["--in", PLAIN, "--seed", "1"], "--seed cannot be given with --in"),
        (["--in", PLAIN, "--reference", "x"], "--reference cannot be given with --in"),
        (["--client", "node=/"], "give --in too"),
        (["--in", PLAIN, "--client", "node=/"], "no --in node"),
        (["--in", "command:false"], "its process died"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(
    options: list[str], words: str, cli: Cli, bundle: Path
) -> None:
    found = cli("validate", bundle, *options)
    assert found.code == 2
    assert found.out == ""
    lines = [line for line in found.err.splitlines() if line.lower().startswith("error")]
    assert len(lines) == 1
    assert words in lines[0]
