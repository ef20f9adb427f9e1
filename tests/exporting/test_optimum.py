"""Bundles on the optimum backend's graph, whose sites are found by the content of their weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lora_edge
from lora_edge.errors import GraphError
from tests.support.adapters import make_adapter, make_all_linear
from tests.support.examples import examples
from tests.support.families import make_base
from tests.support.seq2seq import optimum
from tests.support.shipped import ADAPTERS, BASE, assert_within_limits

pytestmark = optimum


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bundle_equals_our_own(family: str, tmp_path: Path) -> None:
    base = make_base(family, tmp_path / "base")
    adapter = make_all_linear(family, base, tmp_path / "a")
    ids = np.random.default_rng(0).integers(3, 256, (2, 9))
    outputs = {}
    for backend in ("trace", "optimum"):
        for mode in ("switchable", "merged"):
            output = tmp_path / f"{backend}-{mode}"
            lora_edge.export(base, {"a": adapter}, mode, output, backend=backend)  # type: ignore[arg-type]
            outputs[backend, mode] = lora_edge.Runner(output).logits(ids, adapter="a")
    off = lora_edge.Runner(tmp_path / "optimum-switchable").logits(ids)
    pinned = lora_edge.Runner(tmp_path / "optimum-switchable", pinned=["a"])
    outputs["optimum", "pinned"] = pinned.logits(ids, adapter="a")
    assert pinned._session_for("a", 2)[0] is not pinned.decoder
    ours = outputs["trace", "switchable"]
    for actual in outputs.values():
        np.testing.assert_allclose(actual, ours, atol=1e-5)
    assert np.abs(ours - off).max() > 0.01


def test_shipped_switchable(tmp_path: Path) -> None:
    lora_edge.export(BASE, ADAPTERS, output=tmp_path / "out", backend="optimum")
    assert_within_limits(tmp_path / "out", steps=16)


@pytest.mark.parametrize("name", examples(ADAPTERS, ["shout"]))
def test_shipped_merged(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lora_edge.export(BASE, {name: ADAPTERS[name]}, "merged", out, backend="optimum")
    assert_within_limits(out, steps=16)


def test_layers_on_flattened_tokens_are_refused(tmp_path: Path) -> None:
    base = make_base("opt", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "a", r=3, target_modules=["fc1"])
    with pytest.raises(GraphError, match=r"fc1.*takes a branch") as caught:
        lora_edge.export(base, {"a": adapter}, output=tmp_path / "out", backend="optimum")
    assert "--backend trace" in caught.value.hint
    assert not (tmp_path / "out").exists()
