"""A sample of ``ci/sweep``: architectures of every kind end right or refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from tests.support.architectures import Cell, cells, outcome

pytestmark = pytest.mark.skipif(
    transformers.__version__ < "5", reason="the sweep is over the architectures of transformers 5"
)
IMAGES, TEXTS, TEXT = "image-classification", "text-classification", "text-generation"
INTERFACE = "common attention interface"


@pytest.mark.parametrize(
    ("cell", "verdict", "said"),
    [
        (Cell("pvt", IMAGES), "right", ""),
        (Cell("focalnet", IMAGES), "right", ""),
        (Cell("convnext", IMAGES), "right", ""),
        (Cell("dinov2_with_registers", IMAGES), "right", ""),
        (Cell("apertus", TEXT), "right", ""),
        (Cell("resnet", "feature-extraction"), "refused", "resnet models .* last_hidden_state"),
        (Cell("imagegpt", IMAGES), "refused", "imagegpt models .* image_size"),
        (Cell("swiftformer", IMAGES), "right", ""),  # its heads are called head and dist_head
        (Cell("mobilevit", IMAGES), "refused", "windows of all images"),
        (Cell("longformer", TEXTS), "refused", f"longformer models .* {INTERFACE}"),
        (Cell("squeezebert", TEXTS), "refused", f"squeezebert models .* {INTERFACE}"),
        (Cell("doge", TEXTS), "refused", f"doge models .* {INTERFACE}"),
        (Cell("canine", TEXTS), "refused", "config has no vocab_size"),
        (Cell("bart", TEXT), "refused", "BartForCausalLM .*weights take no part"),
        (Cell("mamba", TEXT), "refused", "mamba models .* recurrent state"),
    ],
    ids=lambda value: ":".join(value) if isinstance(value, tuple) else None,
)
def test_right_or_refused_by_name(
    cell: Cell, verdict: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = outcome(cell, tmp_path)
    assert found.verdict == verdict, found.reason
    assert re.search(said, found.reason)
    assert "Torch IR" not in capfd.readouterr().out  # PyTorch prints it beside Python's own stdout


def test_the_sweep_is_over_everything() -> None:
    found = cells()
    assert len(found) == len(set(found))
    assert {cell.task for cell in found} >= {TEXT, TEXTS, IMAGES, "token-classification"}
    assert len([cell for cell in found if cell.task == TEXT]) > 150
