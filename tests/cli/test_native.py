"""``lora-edge native``: what it says when it builds, shows and removes the library."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import Cli
from tests.support.native import native


def test_build_status_remove(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_EDGE_CACHE", str(tmp_path))
    compiler = tmp_path / "compiler"  # makes what was made before, as its last argument says
    compiler.write_text(f'#!/bin/sh\nfor last; do :; done\ncp "{native().library}" "$last"\n')
    compiler.chmod(0o755)
    assert cli("native", "status").out.startswith("not built")
    built = cli("native", "build", "--compiler", compiler)
    assert built.code == 0
    assert Path(built.out.strip()).is_file()
    assert str(compiler) in built.err
    assert "agree with numpy" in built.err
    monkeypatch.delenv("LORA_EDGE_NATIVE")
    assert cli("native", "status").out == built.out
    monkeypatch.setenv("LORA_EDGE_NATIVE", "0")
    assert "turned off by LORA_EDGE_NATIVE=0" in cli("native", "status").out
    assert cli("native", "remove").out == "removed\n"
    assert cli("native", "remove").out == "not built\n"


def test_what_cannot_be_built_is_one_line(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_EDGE_CACHE", str(tmp_path))
    refused = cli("native", "build", "--compiler", "no-such-compiler")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith("error: no C++ compiler was found; looked for no-such-compiler\n")
    assert list(tmp_path.iterdir()) == []
    refused = cli("native", "remove", "--compiler", "c++")
    assert (refused.code, refused.err.splitlines()[0]) == (
        2,
        "error: --compiler is for build, not for remove",
    )
