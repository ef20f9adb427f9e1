"""Quantized bases: kinds of adapters on MatMulNBits, against PyTorch with the same weights."""

from __future__ import annotations

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
from lora_edge.graph.contents import contents
from lora_edge.names import packed_paths
from tests.support.exactness import exact_case
from tests.support.examples import examples
from tests.support.failing import signed
from tests.support.kinds import Made, make_kinds

IDS = np.random.default_rng(5).integers(0, 256, (2, 12))
NAMES = {
    "llama": (
        "plain",
        "dora",
        "lora-bias",
        "saved-linear",
        "embedding",
        "alora",
        "embedding-and-head",
        "tokens",
        "saved-head",
    ),
    "qwen2": ("bias-and-dora", "tokens-untied"),
    "gpt2": ("conv1d-dora",),
}
PRECISIONS = {"llama": "int4", "qwen2": "int8", "gpt2": "int4"}


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


def _quantized(bundle: Path, operator: str = "MatMulNBits") -> int:
    """How many layers of a graph are codes."""
    model = onnx.load(str(bundle / "onnx" / "model.onnx"), load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == operator]
    return sum(len(packed_paths(node.name)) for node in nodes)


@pytest.mark.parametrize("key", examples(NAMES, ["llama", "gpt2"]))
def test_every_kind_is_exact_on_rounded_weights(key: str, made: Callable[[str], Made]) -> None:
    """The export has asked PyTorch; here: how exact it is, and that every layer is codes."""
    found = made(key)
    report = lora_edge.validate(found.bundle)
    assert report.passed, report.table()
    for name in NAMES[key]:
        exact_case(report, name, 0.1)
    manifest = load_bundle(found.bundle).manifest
    assert manifest.precision == PRECISIONS[key]
    assert manifest.quantization is not None
    layers = {**manifest.sites, **manifest.uncovered}
    linear = {path for path, site in layers.items() if site.kind == "linear"}
    embedding = {"gpt2": "transformer.wte"}.get(key, "model.embed_tokens")
    assert set(manifest.quantization.layers) == {*linear, embedding}
    assert _quantized(found.bundle) == len(linear)
    assert _quantized(found.bundle, "GatherBlockQuantized") == 1
    other = dict.fromkeys((manifest.head, embedding), 8) if PRECISIONS[key] == "int4" else {}
    assert manifest.quantization.bits_of == other


TOUCHED = {
    "plain": 4, "dora": 4, "saved-linear": 6, "lora-bias": 4, "embedding": 3,
    "embedding-and-head": 1, "tokens": 5, "saved-head": 5,
}  # fmt: skip


_SHORT = {"dora", "tokens"}


@pytest.mark.parametrize("name", examples(TOUCHED, _SHORT))
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
    # Layers that the adapter leaves alone are codes, those that it is merged into are not; nor is
    # a layer that shares its weight with one of those.
    assert _quantized(tmp_path / "out") == _quantized(found.bundle) - TOUCHED[name]
    assert merged.shape == (2, 12, 256)


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
        report = lora_edge.validate(tmp_path / name, reference=found.base, depth="quick")
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
    report = lora_edge.validate(output, reference=found.base, depth="quick")
    assert any(case.name == "base" for case in report.failures), report.table()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"form": "portable"}, "portable"),
        ({"backend": "optimum"}, "optimum"),
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


def _places(bundle: Path) -> dict[str, tuple[str, int, int] | tuple[()]]:
    return {x.name: x.place for x in contents(bundle / "onnx" / "model.onnx")}


@pytest.mark.parametrize(
    ("layer", "file"),
    examples(
        [
            (layer, file)
            for layer in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
            for file in ("model", "base")
        ],
        [("self_attn.v_proj", "model")],
    ),
)
def test_a_wrong_code_is_found_in_its_layer(
    layer: str, file: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    """Of layers that share one node and one array, the reason names the one."""
    output, wanted = tmp_path / "out", f"model.layers.1.{layer}"
    shutil.copytree(made("llama").bundle, output)
    sites = load_bundle(output).manifest.sites
    held = {
        tuple(packed_paths(content.name.removesuffix(".weight.codes"))): content
        for content in contents(output / "onnx" / f"{file}.onnx")
        if content.name.endswith(".codes")
    }
    ((paths, content),) = ((x, held[x]) for x in held if wanted in x)
    assert len(paths) > 1
    before = paths[: paths.index(wanted)]
    row = sum(sites[path].out_features for path in before)
    name, offset, _ = content.place  # type: ignore[misc]
    with (output / "onnx" / name).open("r+b") as data:
        data.seek(offset + row * content.values()[0].nbytes)
        (byte,) = data.read(1)
        data.seek(-1, 1)
        data.write(bytes([byte ^ 1]))
    signed(output)
    report = lora_edge.validate(output, reference=made("llama").base, depth="quick")
    (case,) = [x for x in report.failures if x.kind == "weights" and f"{file}.onnx:" in x.reason]
    assert f"{wanted}.weight (codes) differs from the checkpoint's in 1 of" in case.reason


def test_a_tied_weight_is_there_once(made: Callable[[str], Made], tmp_path: Path) -> None:
    """And an untied one twice; a head in floats is what it was."""
    places = _places(made("llama").bundle)
    for part in ("codes", "scales"):
        head, embedding = (places[f"{x}.weight.{part}"] for x in ("lm_head", "model.embed_tokens"))
        assert head
        assert head == embedding
    untied = _places(made("qwen2").bundle)
    assert untied["lm_head.weight.codes"] != untied["model.embed_tokens.weight.codes"]
    output = tmp_path / "out"
    lora_edge.export(made("llama").base, {}, output=output, precision="int4", head_precision="fp32")
    assert "model.embed_tokens.weight" in _places(output)
    assert load_bundle(output).manifest.quantization.bits_of == {}  # type: ignore[union-attr]
    assert _quantized(output, "GatherBlockQuantized") == 0


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"head_precision": "int4", "block_size": 16}, marks=pytest.mark.long),
        {"symmetric": True, "block_size": 64},
        pytest.param({"algorithm": "k-quant"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_every_way_of_rounding_is_proved(
    how: dict[str, Any], made: Callable[[str], Made], tmp_path: Path
) -> None:
    found, output = made("llama"), tmp_path / "out"
    own = {name: found.adapters[name] for name in ("dora", "tokens")}
    lora_edge.export(found.base, own, output=output, precision="int4", **how)
    quantization = load_bundle(output).manifest.quantization
    assert quantization is not None
    assert quantization.block_size == how.get("block_size", 32)
    assert quantization.symmetric == how.get("symmetric", False)
    assert quantization.algorithm == how.get("algorithm", "rtn")
    assert any(name.endswith(".zeros") for name in _places(output)) != quantization.symmetric
    # The control: the manifest tells of other codes than there are.
    data: dict[str, Any] = json.loads((output / "lora_edge.json").read_text())
    data["quantization"] |= {"symmetric": not quantization.symmetric, "algorithm": "rtn"}
    (output / "lora_edge.json").write_text(json.dumps(data))
    report = lora_edge.validate(output, reference=found.base, depth="quick")
    assert {"base", "weights"} <= {case.kind for case in report.failures}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"block_size": 48}, "block_size"),
        ({"symmetric": True, "algorithm": "k-quant"}, "symmetric"),
        ({"algorithm": "gptq"}, "algorithm"),
        ({"head_precision": "int3"}, "head_precision"),
        ({"activations": "fp16"}, "activations"),
    ],
)
def test_an_unknown_way_of_rounding_is_refused(
    options: dict[str, Any], named: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    with pytest.raises(lora_edge.LoraEdgeError, match=named):
        lora_edge.export(
            made("qwen2").base, {}, output=tmp_path / "out", precision="int4", **options
        )
