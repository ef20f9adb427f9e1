"""One base, adapters of three kinds, and one exported bundle for all tests of the session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import lora_edge
from tests.support.adapters import make_three
from tests.support.families import make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("llama", tmp_path_factory.mktemp("base"), vocab_size=257)


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_three(base, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session")
def exported(
    base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("bundle") / "out"
    lora_edge.export(base, adapters, output=output)
    return output


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))
