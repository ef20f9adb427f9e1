"""Encoders in int8 with one scale for each output: exact on the codes, the rest is drift."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import transformers

import lora_edge
from lora_edge.bundle.bundle import load_bundle
from lora_edge.cli import main
from lora_edge.errors import OptionError
from lora_edge.graph.contents import contents
from lora_edge.runtime import Runner
from tests.support.encoders import make_encoder, make_encoder_adapter
from tests.support.exactness import exact_case
from tests.support.examples import examples
from tests.support.failing import signed
from tests.support.shipped import BASE

pytestmark = pytest.mark.skipif(
    transformers.__version__ < "5", reason="the small encoders are made with transformers 5"
)
TEXTS, TOKENS = "text-classification", "token-classification"
IDS = [[5, 9, 13, 7, 21], [8, 4, 3, 60, 2]]
_HEAD = {"modules_to_save": ["classifier"]}
ROWS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "texts": ("bert", TEXTS, 2, {"target_modules": ["query", "value"]}),
    "dora": ("bert", TEXTS, 5, {"target_modules": ["query", "dense"], "use_dora": True}),
    "tokens": ("roberta", TOKENS, 4, {"target_modules": ["word_embeddings", "value"]}),
    "embeddings": ("bert", "feature-extraction", 0, {"target_modules": ["query"]}),
    "images": ("vit", "image-classification", 4, {"target_modules": ["q_proj"], **_HEAD}),
    "decoder": ("llama", TEXTS, 3, {"target_modules": ["q_proj", "down_proj"]}),
}
TYPES = {TEXTS: "SEQ_CLS", TOKENS: "TOKEN_CLS"}
Made = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    found: dict[str, Made] = {}

    def make(key: str) -> Made:
        if key not in found:
            family, task, labels, settings = ROWS[key]
            root = tmp_path_factory.mktemp(key)
            base = make_encoder(family, task, root / "base")
            settings = settings | ({"task_type": TYPES[task]} if task in TYPES else {})
            adapter = make_encoder_adapter(base, task, root / "a", labels, **settings)
            lora_edge.export(
                base, {"a": adapter}, output=root / "out", task=task, precision="int8",
                per_channel=True,
            )  # fmt: skip
            found[key] = base, adapter, root / "out"
        return found[key]

    return make


def _operators(bundle: Path, file: str) -> dict[str, str]:
    """Name -> operator of the nodes that read codes."""
    model = onnx.load(str(bundle / "onnx" / f"{file}.onnx"), load_external_data=False)
    codes = {x.name for x in model.graph.initializer if x.name.endswith(".weight.codes")}
    return {node.name: node.op_type for node in model.graph.node if codes.intersection(node.input)}


@pytest.mark.parametrize("key", examples(ROWS, ["texts", "tokens", "images", "decoder"]))
def test_exact_on_its_codes_and_what_ships_multiplies_codes(
    key: str, made: Callable[[str], Made]
) -> None:
    _, _, bundle = made(key)
    report = lora_edge.validate(bundle)
    assert report.passed, report.table()
    exact_case(report, "a", 0.01)
    quantization = load_bundle(bundle).manifest.quantization
    assert quantization is not None
    linear = set(quantization.by_channel)
    assert len(linear) > 5
    assert set(quantization.layers) >= linear
    ships, floats = _operators(bundle, "model"), _operators(bundle, "exact")
    assert {name for name, x in ships.items() if x == "DynamicQuantizeMatMul"} == linear
    read = {name for name, x in floats.items() if x == "Cast"}
    assert read == {f"{path}.weight.codes" for path in linear}
    own = [case.drift for case in report.drift]
    assert all(drift is not None and drift.effect_error > 1e-4 for drift in own)
    exact, fast = Runner(bundle, exact=True), Runner(bundle)
    if key != "images":
        one, other = (x.logits(IDS, adapter="a") for x in (exact, fast))
        assert 1e-6 < np.abs(one - other).max() < 0.1 * np.abs(one).max()


def test_codes_are_of_seven_bits(made: Callable[[str], Made]) -> None:
    """Two products of a code and an activation's fit into 16 bits, which is where others end."""
    _, _, bundle = made("texts")
    linear = load_bundle(bundle).manifest.quantization.by_channel  # type: ignore[union-attr]
    seen = 0
    for content in contents(bundle / "onnx" / "model.onnx"):
        path, _, part = content.name.rpartition(".weight.")
        if part == "codes" and path in linear:
            values = content.values()
            assert values.dtype == np.int8
            assert values.min() == -64
            assert values.max() <= 63
            seen += 1
    assert seen == len(linear)
    assert 2 * 255 * 64 < 1 << 15


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_a_wrong_number_is_found_in_its_layer(
    part: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    base, _, bundle = made("texts")
    name = "bert.encoder.layer.1.attention.self.value.weight"

    shutil.copytree(bundle, tmp_path / "out")
    path = tmp_path / "out" / "onnx" / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    (tensor,) = [x for x in model.graph.initializer if x.name == f"{name}.{part}"]
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[-1] += 1 if part == "codes" else values[-1] / 64
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, str(path))
    signed(tmp_path / "out")
    report = lora_edge.validate(tmp_path / "out", reference=base, depth="quick")
    (case,) = [x for x in report.failures if x.kind == "weights" and "model.onnx:" in x.reason]
    assert f"{name} ({part}) differs from the checkpoint's in" in case.reason


def test_merged_and_switchable_agree(made: Callable[[str], Made], tmp_path: Path) -> None:
    base, adapter, bundle = made("texts")
    lora_edge.export(
        base, {"a": adapter}, "merged", tmp_path / "out", precision="int8", per_channel=True
    )
    merged = Runner(tmp_path / "out", exact=True).logits(IDS)
    switchable = Runner(bundle, exact=True).logits(IDS, adapter="a")
    np.testing.assert_allclose(merged, switchable, atol=3e-5)
    # The layers that the adapter is in are in floats.
    before, after = (set(_operators(x, "model")) for x in (bundle, tmp_path / "out"))
    assert before - after == {x for x in before if x.endswith((".query", ".value"))}
    assert after < before


def test_another_graph_beside_it_is_noticed(made: Callable[[str], Made], tmp_path: Path) -> None:
    """The graph that is proved is the one that ships, in floats."""
    _, _, bundle = made("texts")
    output = tmp_path / "out"
    shutil.copytree(bundle, output)
    path = output / "onnx" / "exact.onnx"
    model = onnx.load(str(path), load_external_data=False)
    query = "bert.encoder.layer.0.attention.self.query.weight.codes"
    (node,) = [x for x in model.graph.node if x.name == query]
    node.input[0] = node.input[0].replace("query", "value")
    onnx.save(model, str(path))
    signed(output)
    report = lora_edge.validate(output, reference=made("texts")[0], depth="quick")
    assert any("are not one graph" in case.reason for case in report.failures)


def test_without_int8_it_is_refused(made: Callable[[str], Made], tmp_path: Path) -> None:
    base, _, _ = made("texts")
    for options in ({}, {"precision": "int4"}, {"precision": "int8", "activations": "fp32"}):
        with pytest.raises(OptionError, match="expected False but with precision int8"):
            lora_edge.export(base, output=tmp_path / "out", per_channel=True, **options)
    assert not (tmp_path / "out").exists()


def test_a_text_generator_is_refused_at_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("export", str(BASE), "-o", str(tmp_path / "out"), "--precision", "int8")
    with pytest.raises(SystemExit):
        main([*given, "--per-channel"])
    assert "--per-channel is for encoders, got text-generation" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
