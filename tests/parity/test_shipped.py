"""The shipped models, switchable and merged, in both forms: within 1e-4 of PyTorch, same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from lora_edge.exporting.export import export
from tests.support.examples import examples
from tests.support.shipped import ADAPTERS, BASE, assert_within_limits


@pytest.mark.parametrize("form", examples(["fused", "portable"], ["fused"]))
def test_switchable(form: Literal["fused", "portable"], tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(BASE, ADAPTERS, output=out, form=form)
    assert_within_limits(out, steps=64 if form == "fused" else 16)
    assert sum(file.stat().st_size for file in (out / "parity").iterdir()) <= 1 << 20


@pytest.mark.parametrize("form", examples(["fused", "portable"], ["fused"]))
@pytest.mark.parametrize(
    "name",
    examples(ADAPTERS, ["shout"]),
)
def test_merged(name: str, form: Literal["fused", "portable"], tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(BASE, {name: ADAPTERS[name]}, "merged", out, form=form)
    assert_within_limits(out, steps=16)
