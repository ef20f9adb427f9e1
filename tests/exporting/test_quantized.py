"""Quantized bases: kinds of adapters on MatMulNBits, against PyTorch with the same weights."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import lora_edge
from lora_edge.bundle.bundle import load_bundle
from tests.support.failing import signed
from tests.support.kinds import make_kinds

IDS = np.random.default_rng(5).integers(0, 256, (2, 12))
NAMES = {
    "llama": ("plain", "dora", "lora-bias", "saved-linear", "embedding", "alora"),
    "qwen2": ("bias-and-dora",),
    "gpt2": ("conv1d-dora",),
}
PRECISIONS = {"llama": "int4", "qwen2": "int8", "gpt2": "int4"}


@dataclasses.dataclass(frozen=True)
class Made:
    base: Path
    adapters: dict[str, Path]
    bundle: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    @functools.cache
    def make(key: str) -> Made:
        root = tmp_path_factory.mktemp(key)
        base, adapters = make_kinds(key, root, NAMES[key])
        output, precision = root / "bundle", PRECISIONS[key]
        lora_edge.export(base, adapters, output=output, precision=precision)  # type: ignore[arg-type]
        return Made(base, adapters, output)

    return make


def _quantized(bundle: Path) -> int:
    """How many layers of a graph are codes."""
    model = onnx.load(str(bundle / "onnx" / "model.onnx"), load_external_data=False)
    return sum(node.op_type == "MatMulNBits" for node in model.graph.node)


@pytest.mark.parametrize("key", NAMES)
def test_every_kind_is_exact_on_rounded_weights(key: str, made: Callable[[str], Made]) -> None:
    """The export has asked PyTorch; here: how exact it is, and that every layer is codes."""
    found = made(key)
    report = lora_edge.validate(found.bundle)
    assert report.passed, report.table()
    for name in NAMES[key]:
        case = next(case for case in report.cases if case.name == f"adapter {name}")
        assert case.figures is not None
        assert case.figures.effect_error <= 1e-4
        assert case.figures.effect_max > 0.1
    manifest = load_bundle(found.bundle).manifest
    assert manifest.precision == PRECISIONS[key]
    assert manifest.quantization is not None
    linear = {
        path
        for path, site in {**manifest.sites, **manifest.uncovered}.items()
        if site.kind == "linear" and path != manifest.head
    }
    assert set(manifest.quantization.layers) == linear
    assert _quantized(found.bundle) == len(linear)


@pytest.mark.parametrize("name", ["plain", "dora", "saved-linear", "lora-bias", "embedding"])
def test_merged_and_switchable_agree(
    name: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    found = made("llama")
    lora_edge.export(
        found.base, {name: found.adapters[name]}, "merged", tmp_path / "out", precision="int4"
    )
    merged = lora_edge.Runner(tmp_path / "out", exact=True).logits(IDS)
    switchable = lora_edge.Runner(found.bundle, exact=True)
    np.testing.assert_allclose(merged, switchable.logits(IDS, adapter=name), atol=3e-5)
    assert np.abs(merged - switchable.logits(IDS)).max() > 0.01
    # Layers that the adapter leaves alone are codes, those that it is merged into are not.
    touched = {"plain": 4, "dora": 4, "saved-linear": 6, "lora-bias": 4, "embedding": 2}[name]
    assert _quantized(tmp_path / "out") == _quantized(found.bundle) - touched


def test_an_added_dora_has_the_norms_of_the_rounded_weights(
    made: Callable[[str], Made], tmp_path: Path
) -> None:
    """And the control: the same adapter with the norms of the weights before they were rounded."""
    found = made("llama")
    for name, precision in (("right", "int4"), ("full", "fp32")):
        output = tmp_path / name
        lora_edge.export(found.base, {}, output=output, kinds=("lora", "dora"), precision=precision)  # type: ignore[arg-type]
        lora_edge.add(output, {"dora": found.adapters["dora"]}, found.base)
    file = Path("adapters") / "dora" / "adapter.onnx_adapter"
    shutil.copytree(tmp_path / "right", tmp_path / "wrong")
    shutil.copyfile(tmp_path / "full" / file, tmp_path / "wrong" / file)
    signed(tmp_path / "wrong")
    cases = {}
    for name in ("right", "wrong"):
        report = lora_edge.validate(tmp_path / name, reference=found.base)
        cases[name] = next(case for case in report.cases if case.name == "adapter dora")
    assert cases["right"].status == "passed", cases["right"].reason
    assert cases["wrong"].status == "failed"
    runner = lora_edge.Runner(tmp_path / "right")
    whole = lora_edge.Runner(found.bundle).logits(IDS, adapter="dora")
    np.testing.assert_allclose(runner.logits(IDS, adapter="dora"), whole, atol=1e-5)
    # Off, a graph of branches is its base, bit for bit, and that is not the base before rounding.
    off = runner.logits(IDS)
    own = lora_edge.Runner(tmp_path / "right", pinned=[None]).logits(IDS)
    np.testing.assert_array_equal(own, off)
    assert np.abs(lora_edge.Runner(tmp_path / "full").logits(IDS) - off).max() > 1e-3


def test_the_reference_rounds_as_the_manifest_says(
    made: Callable[[str], Made], tmp_path: Path
) -> None:
    """The control: a graph of other codes than those that the manifest tells of."""
    found = made("qwen2")
    output = tmp_path / "out"
    shutil.copytree(found.bundle, output)
    data: dict[str, Any] = json.loads((output / "lora_edge.json").read_text())
    data["quantization"]["bits"] = 4
    (output / "lora_edge.json").write_text(json.dumps(data))
    report = lora_edge.validate(output, reference=found.base)
    assert any(case.name == "base" for case in report.failures), report.table()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"form": "portable"}, "portable"),
        ({"backend": "optimum"}, "optimum"),
        ({"task": "feature-extraction"}, "feature-extraction"),
        ({"task": "text2text-generation"}, "text2text-generation"),
    ],
)
def test_other_graphs_are_refused_by_name(
    options: dict[str, Any], named: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    found = made("llama")
    with pytest.raises(lora_edge.LoraEdgeError, match=f"int4.*{named}") as caught:
        lora_edge.export(found.base, {}, output=tmp_path / "out", precision="int4", **options)
    assert "--precision fp32" in caught.value.hint
    assert ("--form fused" in caught.value.hint) == ("form" in options)
    assert not (tmp_path / "out").exists()


def test_an_unknown_precision_is_refused(made: Callable[[str], Made], tmp_path: Path) -> None:
    base = made("qwen2").base
    with pytest.raises(lora_edge.LoraEdgeError, match="'int3' is no precision"):
        lora_edge.export(base, {}, output=tmp_path / "out", precision="int3")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
