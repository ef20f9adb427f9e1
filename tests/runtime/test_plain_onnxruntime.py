"""The example's helper: the shipped adapter files through onnxruntime's own LoraAdapter."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from lora_edge.runtime import Runner
from tests.support.modules import load_file
from tests.support.paths import ROOT

EXAMPLE = ROOT / "examples" / "plain_onnxruntime.py"


@pytest.fixture(scope="module")
def example() -> Any:
    yield load_file("plain_onnxruntime", EXAMPLE)
    sys.modules.pop("plain_onnxruntime", None)


@pytest.mark.parametrize("form", ["fused", "portable"])
def test_it_gives_what_the_runner_gives(
    example: Any, tiny: Any, bundles: dict[str, Any], form: str
) -> None:
    bundle = bundles[form]
    (ids,) = tiny.rows(9)
    runner = Runner(bundle, threads=1)
    for name in ("alpha", "beta"):
        found = example.logits(bundle.directory, name, ids)
        np.testing.assert_allclose(found, runner.logits([ids], adapter=name)[0, -1], atol=1e-5)
    assert np.abs(found - runner.logits([ids])[0, -1]).max() > 0.01


def test_the_public_run_refuses(bundles: dict[str, Any]) -> None:
    """Why the helper goes below it; the day that this fails it need not."""
    bundle = bundles["fused"]
    session = ort.InferenceSession(
        str(bundle.directory / "onnx/model.onnx"), providers=["CPUExecutionProvider"]
    )
    adapter = ort.LoraAdapter()
    adapter.Load(str(bundle.directory / bundle.adapter("alpha").file))
    options = ort.RunOptions()
    options.add_active_adapter(adapter)
    with pytest.raises(ValueError, match=r"Required inputs .* are missing"):
        session.run(["logits"], {"input_ids": np.zeros((1, 1), np.int64)}, options)
