"""The command line in this process, and a bundle of the shipped models for all tests."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_edge
from lora_edge.cli import main
from tests.support.commands import Cli, Result
from tests.support.paths import MODELS


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """Call the entry point of ``lora-edge``, as its console script does."""
    terminated = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        assert isinstance(stopped.value.code, int)
        return Result(stopped.value.code, *capsys.readouterr())

    yield call
    signal.signal(signal.SIGTERM, terminated)


@pytest.fixture(scope="session")
def base() -> Path:
    return MODELS / "tiny-llama"


@pytest.fixture(scope="session")
def adapters() -> dict[str, Path]:
    return {name: MODELS / "adapters" / name for name in ("echo", "mirror", "shout")}


@pytest.fixture(scope="session")
def bundle(base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    output = tmp_path_factory.mktemp("cli") / "bundle"
    lora_edge.export(base, adapters, output=output)
    return output
