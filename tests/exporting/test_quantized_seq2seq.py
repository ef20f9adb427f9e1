"""Encoder-decoders in few bits: both graphs proved, measured beside it, merged, or refused."""

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
from lora_edge.bundle.bundle import Bundle, load_bundle
from lora_edge.graph.contents import contents
from lora_edge.names import packed_paths
from lora_edge.parity.drift import DriftLimits
from tests.support import seq2seq
from tests.support.commands import exit_code
from tests.support.exactness import exact_case
from tests.support.examples import examples
from tests.support.failing import signed
from tests.support.kinds import Made

pytestmark = seq2seq.optimum
PARTS = ("encoder", "decoder")
HEADS = {
    "t5": ("lm_head", "shared"),
    "t5-gated": ("lm_head", "shared"),
    "bart": ("lm_head", "model.shared"),
    "whisper": ("proj_out", "model.decoder.embed_tokens"),
}
"""The output layer and the token embedding; of all but t5-gated they share their weight."""
ADAPTERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "every": lambda family: {"target_modules": seq2seq.ALL[family]},
    "dora": lambda family: {"target_modules": seq2seq.ATTENTION[family], "use_dora": True},
}
KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True, "target_modules": ["q", "wo"]},
    "lora_bias": {"bias": "lora_only", "lora_bias": True, "target_modules": ["k", "wi"]},
    "modules_to_save": {"target_modules": ["q"], "modules_to_save": ["wo", "layer_norm"]},
    "tied head": {"target_modules": ["v", "lm_head"]},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Made]:
    """A switchable bundle of a family and a precision, made once; not to be changed."""

    @functools.cache
    def make(family: str, precision: str) -> Made:
        root = tmp_path_factory.mktemp(family)
        base = seq2seq.make_seq2seq(family, root / "base")
        if family == "t5":
            seq2seq.give_words(base)
        adapters = {
            name: seq2seq.make_seq2seq_adapter(
                base, root / name, family, seed, r=3, **settings(family)
            )
            for seed, (name, settings) in enumerate(ADAPTERS.items(), 1)
        }
        _export(base, adapters, root / "bundle", precision=precision)
        return Made(base, adapters, root / "bundle")

    return make


def _export(base: Path, adapters: dict[str, Path], output: Path, **options: Any) -> Bundle:
    return lora_edge.export(
        base, adapters, output=output, **{"backend": "optimum", "precision": "int8", **options}
    )


def _inputs(family: str, count: int = 2) -> Any:
    random = np.random.default_rng(5)
    if family == "whisper":
        return random.standard_normal((count, 16, 40)).astype(np.float32)
    return [random.integers(3, seq2seq.VOCAB, 4 + 3 * row).tolist() for row in range(count)]


def _codes(bundle: Path, part: str, file: str = "model") -> dict[str, tuple[str, int, set[int]]]:
    """Layer -> operator, bits and accuracy level, of those that a graph has as codes."""
    path = bundle / "onnx" / f"{part}_{file}.onnx"
    model = onnx.load(str(path), load_external_data=False)
    return {
        layer: (
            node.op_type,
            next(x.i for x in node.attribute if x.name == "bits"),
            {x.i for x in node.attribute if x.name == "accuracy_level"},
        )
        for node in model.graph.node
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized")
        for layer in packed_paths(node.name)
    }


@pytest.mark.parametrize(
    ("family", "precision"),
    examples([(x, y) for x in HEADS for y in ("int8", "int4")], [("t5", "int4")]),
)
def test_both_graphs_are_codes_and_proved(
    family: str, precision: str, made: Callable[[str, str], Made]
) -> None:
    """The export has asked PyTorch; here: how exact it is, from the goldens, and what is codes."""
    found, (head, embedding) = made(family, precision), HEADS[family]
    report = lora_edge.validate(found.bundle)
    assert report.passed, report.table()
    for name in ADAPTERS:
        exact_case(report, name, 0.1)
    assert [case.adapters for case in report.drift] == [(), ("dora",), ("every",)]
    for case in report.drift:
        assert case.drift is not None
        assert 1e-8 < case.drift.kl < case.drift.kl_limit
        assert case.drift.perplexity == pytest.approx(case.drift.exact_perplexity, rel=0.1)
        assert case.drift.perplexity != case.drift.exact_perplexity
    manifest = load_bundle(found.bundle).manifest
    assert (manifest.precision, manifest.quantization is None) == (precision, False)
    layers = {**manifest.sites, **manifest.uncovered}
    linear = {path for path, site in layers.items() if site.kind == "linear"}
    assert manifest.quantization is not None
    assert set(manifest.quantization.layers) == {*linear, embedding}
    bits = {"int8": 8, "int4": 4}[precision]
    speech = family == "whisper"
    for part in PARTS:
        assert manifest.parts[part].exact == f"onnx/{part}_exact.onnx"
        own = {path for path in linear if (".encoder." in f".{path}") == (part == "encoder")}
        for file, level in (("model", 4), ("exact", 1)):
            held = _codes(found.bundle, part, file)
            assert set(held) == own | ({embedding} if part == "decoder" or not speech else set())
            for path, (operator, own_bits, levels) in held.items():
                gathers = path == embedding
                assert operator == ("GatherBlockQuantized" if gathers else "MatMulNBits")
                assert own_bits == (8 if path in (head, embedding) else bits)
                assert levels == (set() if gathers else {level})


@pytest.mark.parametrize("family", examples(["t5", "bart"], ["t5"]))
def test_a_tied_weight_is_once_in_each_file(family: str, made: Callable[[str, str], Made]) -> None:
    """Also BART's, whose output layer optimum gives a copy."""
    head, embedding = HEADS[family]
    files = (made(family, "int4").bundle / "onnx" / f"{part}_model.onnx" for part in PARTS)
    encoder, decoder = ({x.name: x for x in contents(file)} for file in files)
    codes = decoder[f"{embedding}.weight.codes"]
    assert decoder[f"{head}.weight.codes"].place == codes.place
    np.testing.assert_array_equal(encoder[f"{embedding}.weight.codes"].values(), codes.values())


def test_a_decoder_does_not_read_its_encoder_for_all_layers_at_once(
    made: Callable[[str, str], Made],
) -> None:
    """K and V of a layer are one node; those of another layer are another's."""
    file = made("t5", "int4").bundle / "onnx" / "decoder_model.onnx"
    nodes = onnx.load(str(file), load_external_data=False).graph.node
    packed = [packed_paths(node.name) for node in nodes if node.op_type == "MatMulNBits"]
    cross = [sorted(x) for x in packed if any(y.endswith("EncDecAttention.v") for y in x)]
    module = "decoder.block.{}.layer.1.EncDecAttention.{}"
    assert cross == [[module.format(block, x) for x in "kv"] for block in range(2)]


def test_what_ships_and_what_is_proved_answer(
    made: Callable[[str, str], Made], capsys: pytest.CaptureFixture[str]
) -> None:
    found = made("t5", "int4")
    fast, exact = lora_edge.Runner(found.bundle), lora_edge.Runner(found.bundle, exact=True)
    inputs, targets = _inputs("t5"), [[0, 8, 9], [0, 4]]
    for state in (None, "every"):
        off = fast.seq2seq_logits(inputs, targets, state)
        off -= exact.seq2seq_logits(inputs, targets, state)
        assert 1e-5 < np.abs(off).max() < 1
    answer = exact.generate(["w5 w6 w7", "w9"], ["every", None], 6)
    command = ["run", str(found.bundle), "-a", "every", "-p", "w5 w6 w7", "--max-new-tokens", "6"]
    assert exit_code([*command, "--exact"]) == 0
    assert capsys.readouterr().out.strip() == answer[0]
    assert exit_code(command) == 0
    assert capsys.readouterr().out.strip() == fast.generate("w5 w6 w7", "every", 6)[0]
    assert exit_code(["inspect", str(found.bundle)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "34 layers to 4 bits, lm_head to 8, shared to 8" in said
    assert "activations in int8" in said
    card = (found.bundle / "README.md").read_text()
    assert "onnx/encoder_exact.onnx" in card
    assert "onnx/decoder_exact.onnx" in card


@pytest.mark.long
def test_a_whisper_of_few_bits_transcribes(made: Callable[[str, str], Made]) -> None:
    bundle = made("whisper", "int8").bundle
    fast, exact = lora_edge.Runner(bundle), lora_edge.Runner(bundle, exact=True)
    speech = _inputs("whisper", 3)
    states = ["every", None, "dora"]
    said = exact.generate_ids(speech, states, 8)  # type: ignore[arg-type]
    alone = [exact.generate_ids(speech[i : i + 1], x, 8)[0] for i, x in enumerate(states)]  # type: ignore[arg-type]
    assert said == alone
    assert all(0 < len(row) <= 8 for row in said)
    assert len({tuple(row) for row in said}) == 3
    targets = [[3, *row] for row in said]
    off = fast.seq2seq_logits(speech, targets, states) - exact.seq2seq_logits(  # type: ignore[arg-type]
        speech,
        targets,
        states,  # type: ignore[arg-type]
    )
    assert 1e-5 < np.abs(off).max() < 0.5


@pytest.mark.long
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("family", HEADS)
def test_merged_and_switchable_agree(
    family: str, name: str, precision: str, made: Callable[[str, str], Made], tmp_path: Path
) -> None:
    found = made(family, precision)
    own, output = {name: found.adapters[name]}, tmp_path / "out"
    _export(found.base, own, output, mode="merged", precision=precision)
    merged = lora_edge.Runner(output, exact=True)
    both = lora_edge.Runner(found.bundle, exact=True)
    inputs, targets = _inputs(family), [[3, 8, 9], [3, 4]]
    ours = both.seq2seq_logits(inputs, targets, name)
    np.testing.assert_allclose(merged.seq2seq_logits(inputs, targets), ours, atol=5e-5)
    assert np.abs(both.seq2seq_logits(inputs, targets) - ours).max() > 0.01
    # The layers that the adapter is merged into are in floats, all others are codes.
    settings = ADAPTERS[name](family)
    for part in PARTS:
        before, after = _codes(found.bundle, part), _codes(output, part)
        touched = {x for x in before if x.rpartition(".")[2] in settings["target_modules"]}
        assert set(after) == set(before) - touched
        assert touched


@pytest.mark.parametrize(
    ("family", "precision", "keep_high"),
    examples(
        [
            (x, precision, keep_high)
            for x in HEADS
            if x != "t5-gated"  # of random weights it drifts too far
            for precision, keep_high in (("int8", "none"), ("int4", "none"), ("int4", "auto"))
        ],
        [("bart", "int4", "none")],
    ),
)
def test_merged_then_rounded_is_proved(
    family: str, precision: str, keep_high: str, tmp_path: Path
) -> None:
    """BART's encoder and decoder have modules of their own for one embedding."""
    base = seq2seq.make_seq2seq(family, tmp_path / "base")
    adapter = seq2seq.make_seq2seq_adapter(
        base, tmp_path / "a", family, 1, r=3, target_modules=seq2seq.ALL[family]
    )
    made = _export(
        base, {"a": adapter}, tmp_path / "out", mode="merged", precision=precision,
        keep_high=keep_high, min_effect=0.85,
    )  # fmt: skip
    manifest = made.manifest
    assert manifest.quantization is not None
    assert manifest.quantization.merged_first
    assert manifest.survival is not None
    assert 0.85 <= manifest.survival.effect.retained < 1
    assert len(manifest.survival.layers) == len(manifest.quantization.layers) - 2
    coded = [_codes(made.directory, part) for part in PARTS]
    assert sum(map(len, coded)) == len(manifest.quantization.layers) + (family != "whisper")
    report = lora_edge.validate(made)
    assert report.passed, report.table()
    exact_case(report, "a", 0.1)


@pytest.mark.long
def test_a_lost_effect_is_refused_and_auto_keeps_it(tmp_path: Path) -> None:
    """An adapter of a small change, in few bits: nothing is published below the floor."""
    base = seq2seq.make_seq2seq("t5", tmp_path / "base")
    adapter = seq2seq.make_seq2seq_adapter(
        base, tmp_path / "a", "t5", 1, r=3, target_modules=seq2seq.ALL["t5"]
    )
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    config["lora_alpha"] /= 20
    file.write_text(json.dumps(config))
    options: dict[str, Any] = {"mode": "merged", "precision": "int4"}
    with pytest.raises(lora_edge.ParityError, match="of its effect is retained") as caught:
        _export(base, {"a": adapter}, tmp_path / "out", keep_high="none", **options)
    assert "--keep-high auto" in caught.value.hint
    assert not (tmp_path / "out").exists()
    made = _export(base, {"a": adapter}, tmp_path / "out", keep_high="auto", **options)
    assert made.manifest.survival is not None
    assert made.manifest.survival.effect.retained >= 0.9
    assert set(made.manifest.survival.high.values()) <= {8, 32}
    assert made.manifest.survival.high
    assert lora_edge.validate(made, base).passed


@pytest.mark.long
@pytest.mark.parametrize("how", ["switchable", "touched", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_proved(kind: str, how: str, tmp_path: Path) -> None:
    base = seq2seq.make_seq2seq("t5", tmp_path / "base")
    adapter = seq2seq.make_seq2seq_adapter(base, tmp_path / "a", "t5", 3, r=3, **KINDS[kind])
    options: dict[str, Any] = {}
    if how != "switchable":
        options = {"mode": "merged", "keep_high": how}
    made = _export(base, {"a": adapter}, tmp_path / "out", precision="int8", **options)
    report = lora_edge.validate(made, base)
    assert report.passed, report.table()
    exact_case(report, "a", 0.1)
    # An embedding that shares its weight with an adapted output layer is the base's in the encoder.
    assert "shared" in _codes(made.directory, "encoder")


@pytest.mark.long
@pytest.mark.parametrize(
    ("part", "layer"),
    [
        ("encoder", "encoder.block.1.layer.0.SelfAttention.v"),
        ("decoder", "decoder.block.0.layer.1.EncDecAttention.k"),
        ("encoder", "shared"),
    ],
)
def test_a_wrong_code_is_found_in_its_layer(
    part: str, layer: str, made: Callable[[str, str], Made], tmp_path: Path
) -> None:
    found = made("t5", "int4")
    output = Path(shutil.copytree(found.bundle, tmp_path / "out"))
    held = {
        path: content
        for content in contents(output / "onnx" / f"{part}_model.onnx")
        if content.name.endswith(".codes")
        for path in packed_paths(content.name.removesuffix(".weight.codes"))
    }
    paths = packed_paths(held[layer].name.removesuffix(".weight.codes"))
    data, offset, length = held[layer].place  # type: ignore[misc]
    with (output / "onnx" / data).open("r+b") as stored:
        stored.seek(offset + (0 if paths[0] == layer else length - 1))
        (byte,) = stored.read(1)
        stored.seek(-1, 1)
        stored.write(bytes([byte ^ 1]))
    signed(output)
    report = lora_edge.validate(output, reference=found.base, depth="quick")
    reasons = [case.reason for case in report.failures if case.kind == "weights"]
    wanted = f"{layer}.weight (codes) differs from the checkpoint's in 1 of"
    for graph in ("model", "exact"):
        file = f"onnx/{part}_{graph}.onnx"
        assert any(f"{file}: " in x and wanted in x for x in reasons), reasons


@pytest.mark.long
def test_the_reference_rounds_as_the_manifest_says(
    made: Callable[[str, str], Made], tmp_path: Path
) -> None:
    """The control: graphs of other codes than those that the manifest tells of."""
    found = made("t5", "int4")
    output = Path(shutil.copytree(found.bundle, tmp_path / "out"))
    data: dict[str, Any] = json.loads((output / "lora_edge.json").read_text())
    data["quantization"]["bits"] = 8
    (output / "lora_edge.json").write_text(json.dumps(data))
    report = lora_edge.validate(output, reference=found.base, depth="quick")
    assert any(case.name == "base" for case in report.failures), report.table()
    assert all(case.status == "passed" for case in report.drift)


@pytest.mark.long
@pytest.mark.parametrize("part", PARTS)
def test_the_graph_that_ships_is_the_one_that_is_proved(
    part: str, made: Callable[[str, str], Made], tmp_path: Path
) -> None:
    found = made("t5", "int4")
    output = Path(shutil.copytree(found.bundle, tmp_path / "out"))
    file = output / "onnx" / f"{part}_model.onnx"
    model = onnx.load(str(file), load_external_data=False)
    node = next(node for node in model.graph.node if node.name.endswith(".gated"))
    node.input[0], node.input[1] = node.input[1], node.input[0]  # a product all the same
    onnx.save(model, str(file))
    signed(output)
    report = lora_edge.validate(output, reference=found.base, depth="quick")
    (case,) = [case for case in report.failures if case.kind == "weights"]
    assert f"onnx/{part}_model.onnx and onnx/{part}_exact.onnx are not one graph" in case.reason
    assert all(case.status == "passed" for case in report.drift)


def test_too_much_drift_fails_and_is_not_laid_on_the_adapter(
    made: Callable[[str, str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_edge.parity.drift.DriftLimits", lambda: DriftLimits(kl=1e-12))
    report = lora_edge.validate(made("t5", "int4").bundle)
    assert report.exact
    assert not report.passed
    assert {case.kind for case in report.failures} == {"drift"}
    assert all(report.adapter_passed(name) for name in ADAPTERS)


@pytest.mark.long
def test_an_added_dora_has_the_norms_of_the_rounded_weights(
    made: Callable[[str, str], Made], tmp_path: Path
) -> None:
    found, output = made("t5", "int4"), tmp_path / "out"
    own = {"every": found.adapters["every"]}
    _export(found.base, own, output, precision="int4", kinds=("lora", "dora"))
    lora_edge.add(output, {"dora": found.adapters["dora"]}, found.base)
    assert not lora_edge.validate(output).passed  # not compared with PyTorch yet
    assert lora_edge.validate(output, reference=found.base).passed
    assert lora_edge.validate(output).passed
    inputs, targets = _inputs("t5"), [[0, 8, 9], [0, 4]]
    added, whole = (
        lora_edge.Runner(x, exact=True).seq2seq_logits(inputs, targets, "dora")
        for x in (output, found.bundle)
    )
    np.testing.assert_allclose(added, whole, atol=1e-5)
    # The control: norms of the weights before they were rounded.
    _export(found.base, {}, tmp_path / "full", precision="fp32", kinds=("lora", "dora"))
    lora_edge.add(tmp_path / "full", {"dora": found.adapters["dora"]}, found.base)
    file = Path("adapters") / "dora" / "adapter.onnx_adapter"
    shutil.copyfile(tmp_path / "full" / file, output / file)
    signed(output)
    assert not lora_edge.validate(output, reference=found.base).adapter_passed("dora")


@pytest.mark.long
@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
@pytest.mark.parametrize(
    "how",
    [
        {"algorithm": "k-quant"},
        {"symmetric": True, "block_size": 16},
        {"head_precision": "int4"},
        {"head_precision": "fp32"},
        {"block_size": 64},
        {"activations": "fp32"},
    ],
    ids=str,
)
def test_every_way_of_rounding_is_proved(family: str, how: dict[str, Any], tmp_path: Path) -> None:
    base = seq2seq.make_seq2seq(family, tmp_path / "base")
    adapter = seq2seq.make_seq2seq_adapter(
        base, tmp_path / "a", family, 1, r=3, target_modules=seq2seq.ALL[family]
    )
    said: list[str] = []
    made = _export(
        base, {"a": adapter}, tmp_path / "out", precision="int4", progress=said.append, **how
    )
    quantization, (head, embedding) = made.manifest.quantization, HEADS[family]
    assert quantization is not None
    # 64 is no divisor of the embedding's width: it stays, with all that share its weight.
    floats = how.get("block_size") == 64 or how.get("head_precision") == "fp32"
    assert ({head, embedding} <= set(quantization.layers)) == (not floats)
    assert any("stays in fp32" in line for line in said) == (how.get("block_size") == 64)
    assert len(quantization.layers) == (32 if floats else 34)
    exact = [made.directory / "onnx" / f"{part}_exact.onnx" for part in PARTS]
    assert all(path.exists() == ("activations" not in how) for path in exact)
    assert lora_edge.validate(made).passed


@pytest.mark.parametrize(
    ("options", "said", "hint"),
    [
        ({"precision": "fp16"}, "fp16.*text2text-generation", "--precision int8"),
        ({"per_channel": True}, "--per-channel is for encoders", "Leave --per-channel out"),
        ({"form": "portable"}, "int8.*portable", "--form fused"),
        ({"backend": "trace"}, "int8.*trace", "--backend optimum"),
    ],
)
def test_what_does_not_go_is_refused_with_what_does(
    options: dict[str, Any], said: str, hint: str, tmp_path: Path
) -> None:
    base = seq2seq.make_seq2seq("t5", tmp_path / "base")
    with pytest.raises(lora_edge.LoraEdgeError, match=said) as caught:
        _export(base, {}, tmp_path / "out", **options)
    assert hint in caught.value.hint
    assert not (tmp_path / "out").exists()
