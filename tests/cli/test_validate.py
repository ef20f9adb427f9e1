"""``validate`` and ``golden``: sessions, depths, examples, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.commands import Cli


def test_sessions_and_depth(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    result = cli(
        "validate",
        bundle,
        "--quick",
        "--optimization",
        "basic",
        "--optimization",
        "all",
        "--json",
        file,
    )
    assert result.code == 0
    assert "adapter echo (cpu, all)" in result.out
    assert "adapter echo (cpu, basic)" in result.out
    data = json.loads(file.read_text())
    assert [session["optimization"] for session in data["sessions"]] == ["all", "basic"]
    assert data["settings"]["depth"] == "quick"
    assert data["command"].startswith("lora-edge validate ")
    again = cli(*data["command"].split()[1:], "--json", file)
    assert again.code == 0
    repeated = json.loads(file.read_text())
    for each in (data, repeated):
        del each["seconds"], each["summary"]
    assert repeated == data


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompts", "prompts.txt"], "--prompts needs --reference"),
        (["--eval", "data.jsonl"], "--eval needs --reference"),
        (["--optimization", "most"], "most"),
        (["--provider", "nowhere"], "nowhere"),
        (["--steps", "0"], "--steps"),
    ],
)
def test_refusals(cli: Cli, bundle: Path, arguments: list[str], words: str) -> None:
    result = cli("validate", bundle, *arguments)
    assert result.code == 2
    assert words in result.err
    assert result.out == ""


def test_a_metric_for_an_adapter(cli: Cli, bundle: Path, base: Path, tmp_path: Path) -> None:
    data = tmp_path / "echo.jsonl"
    lines = (base.parent / "data" / "echo.jsonl").read_text().splitlines()[:8]
    data.write_text("\n".join(lines) + "\n")
    own = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    options = ["--reference", base, "--steps", "1", "--json", tmp_path / "report.json"]
    assert cli("validate", own, *options, "--eval", f"echo={data}").code == 0
    (task,) = (c for c in json.loads((tmp_path / "report.json").read_text())["cases"] if c["task"])
    assert task["adapters"] == ["echo"]
    assert task["task"]["examples"] == 8


def test_golden(cli: Cli, bundle: Path, base: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Word: river Answer:", "adapter": "echo"}\n')
    result = cli("golden", own, "--prompts", prompts, "--reference", base, "--steps", "2")
    assert result.code == 0
    assert result.out == f"{own}\n"
    assert "adapter echo, given prompts 1" in cli("validate", own, "--quick").out
    missing = cli("golden", own, "--prompts", tmp_path / "none.txt", "--reference", base)
    assert missing.code == 2
    assert "none.txt cannot be read" in missing.err
