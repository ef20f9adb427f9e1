"""One base, adapters of three kinds, and one exported bundle for all tests of the session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import lora_edge
from tests.support.adapters import make_adapter
from tests.support.families import make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("llama", tmp_path_factory.mktemp("base"), vocab_size=257)


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    some = ["q_proj", "v_proj"]
    return {
        "plain": make_adapter(base, root / "plain", 1, r=8, lora_alpha=16, target_modules=some),
        "rs": make_adapter(
            base, root / "rs", 2, r=16, lora_alpha=8, use_rslora=True, target_modules="all-linear"
        ),
        "pattern": make_adapter(
            base,
            root / "pattern",
            3,
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "o_proj", "down_proj"],
            rank_pattern={"layers.0.self_attn.q_proj": 2, "down_proj": 6},
            alpha_pattern={r"layers\.1\..*": 3},
        ),
    }


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
