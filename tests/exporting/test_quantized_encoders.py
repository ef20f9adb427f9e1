"""Models without a cache in few bits: what is proved, measured beside it, or refused."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import transformers

import lora_edge
from lora_edge.bundle.bundle import load_bundle
from lora_edge.graph.contents import contents
from lora_edge.names import packed_paths
from lora_edge.parity.case import Case
from lora_edge.parity.drift import DriftLimits
from lora_edge.parity.plan.examples import Example
from lora_edge.reports import html, junit, load_report, markdown
from tests.support.commands import exit_code
from tests.support.encoders import make_encoder, make_encoder_adapter
from tests.support.exactness import exact_case
from tests.support.examples import examples
from tests.support.failing import signed
from tests.support.kinds import Made
from tests.support.paths import MODELS
from tests.support.saving import save_model

pytestmark = pytest.mark.skipif(
    transformers.__version__ < "5", reason="the small encoders are made with transformers 5"
)
Settings = dict[str, Any]


class Row(NamedTuple):
    """A base of a task and adapters on it: name -> number of labels and settings."""

    family: str
    task: str
    adapters: dict[str, tuple[int, Settings]]
    embedding: str = ""


_TEXTS = {"task_type": "SEQ_CLS"}
_HIDDEN = {"task_type": "FEATURE_EXTRACTION"}
ROWS = {
    "texts": Row(
        "bert",
        "text-classification",
        {
            "two": (2, {"target_modules": ["query", "value"], **_TEXTS}),
            "dora": (5, {"target_modules": ["query", "dense"], "use_dora": True, **_TEXTS}),
        },
        "bert.embeddings.word_embeddings",
    ),
    "tokens": Row(
        "bert",
        "token-classification",
        {
            "embedding": (
                4,
                {"target_modules": ["word_embeddings", "value"], "task_type": "TOKEN_CLS"},
            ),
        },
        "bert.embeddings.word_embeddings",
    ),
    "embeddings": Row(
        "bert",
        "feature-extraction",
        {
            "one": (0, {"target_modules": ["query", "value"], **_HIDDEN}),
            "normed": (
                0,
                {"target_modules": ["query"], "modules_to_save": ["LayerNorm"], **_HIDDEN},
            ),
        },
        "embeddings.word_embeddings",
    ),
    "images": Row(
        "vit",
        "image-classification",
        {"linear": (4, {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]})},
    ),
    "convnext": Row(  # whose embedding is none that transformers knows
        "convnext",
        "image-classification",
        {"linear": (4, {"target_modules": ["pwconv1"], "modules_to_save": ["classifier"]})},
    ),
    "roberta": Row(
        "roberta",
        "text-classification",
        {"two": (2, {"target_modules": ["query", "value"], **_TEXTS})},
        "roberta.embeddings.word_embeddings",
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Made]:
    @functools.cache
    def make(key: str, precision: str) -> Made:
        row, root = ROWS[key], tmp_path_factory.mktemp(f"{key}-{precision}")
        base = make_encoder(row.family, row.task, root / "base")
        adapters = {
            name: make_encoder_adapter(base, row.task, root / name, labels, **settings)
            for name, (labels, settings) in row.adapters.items()
        }
        output = root / "bundle"
        lora_edge.export(base, adapters, output=output, task=row.task, precision=precision)  # type: ignore[arg-type]
        return Made(base, adapters, output)

    return make


def _quantized(bundle: Path, file: str = "model") -> dict[str, set[int]]:
    """Operator and path of each layer of codes -> its accuracy level, 0 where it has none."""
    model = onnx.load(str(bundle / "onnx" / f"{file}.onnx"), load_external_data=False)
    return {
        f"{node.op_type} {path}": {a.i for a in node.attribute if a.name == "accuracy_level"}
        for node in model.graph.node
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized")
        for path in packed_paths(node.name)
    }


@pytest.mark.parametrize(
    ("key", "precision"),
    examples(
        [(key, precision) for key in ROWS for precision in ("int8", "int4")],
        [("texts", "int8"), ("tokens", "int4"), ("embeddings", "int4"), ("convnext", "int4")],
    ),
)
def test_every_task_is_exact_on_rounded_weights(
    key: str, precision: str, made: Callable[[str, str], Made]
) -> None:
    """The export has asked PyTorch; here: how exact it is, and what is codes."""
    row, found = ROWS[key], made(key, precision)
    report = lora_edge.validate(found.bundle)
    assert report.passed, report.table()
    for name in row.adapters:
        exact_case(report, name, 0.01)
    manifest = load_bundle(found.bundle).manifest
    quantization = manifest.quantization
    assert quantization is not None
    assert (manifest.precision, quantization.bits) == (precision, {"int8": 8, "int4": 4}[precision])
    layers = {**manifest.sites, **manifest.uncovered}
    # A head stays as it is, whatever it is made of.
    linear = {path for path, x in layers.items() if x.kind == "linear" and "classifier" not in path}
    gathered = {row.embedding} - {""}
    assert len(linear) > 5
    assert set(quantization.layers) == linear | gathered
    level = {f"MatMulNBits {path}" for path in linear}
    codes = {f"GatherBlockQuantized {path}" for path in gathered}
    for file, value in (("model", 4), ("exact", 1)):
        levels = _quantized(found.bundle, file)
        assert set(levels) == level | codes
        assert all(levels[x] == {value} for x in level)


@pytest.mark.parametrize(
    "key", examples(["texts", "tokens", "embeddings", "images"], ["texts", "embeddings"])
)
def test_drift_has_the_figures_of_the_task(
    key: str, made: Callable[[str, str], Made], tmp_path: Path
) -> None:
    report = lora_edge.validate(made(key, "int8").bundle)
    assert [case.adapters for case in report.drift] == [
        (),
        *((x,) for x in sorted(ROWS[key].adapters)),
    ]
    embeds = key == "embeddings"
    for case in report.drift:
        own = case.drift
        assert own is not None
        assert own.effect_error > 1e-4
        assert own.positions > 8  # the rows of mixed batches among them
        assert math.isnan(own.perplexity)
        assert math.isnan(own.retained) == (not case.adapters)
        if embeds:
            assert 0.999 < own.cosine < 1 - 1e-7
            assert math.isnan(own.kl)
            assert math.isnan(own.top1)
        else:
            assert 0 < own.kl < own.kl_limit
            assert own.top1 > 0.8
            assert math.isnan(own.cosine)
    exact = [case.figures for case in report.cases if case.figures is not None]
    assert max(figures.logit_error for figures in exact) < 1e-4
    (tmp_path / "r.json").write_text(report.to_json())
    data = load_report(tmp_path / "r.json")
    told = f"{report.drift[0].drift.cosine:.6f}" if embeds else ""  # type: ignore[union-attr]
    for text in (html(data), markdown(data), (made(key, "int8").bundle / "README.md").read_text()):
        assert "cosine" in text
        assert told in text
    assert "drift, base" in junit(data)


@pytest.mark.parametrize(
    ("key", "name", "touched"),
    [("texts", "dora", ("query", "dense")), ("embeddings", "normed", ("query",))],
)
def test_merged_and_switchable_agree(
    key: str, name: str, touched: tuple[str, ...], made: Callable[[str, str], Made], tmp_path: Path
) -> None:
    found, task = made(key, "int4"), ROWS[key].task
    own = {name: found.adapters[name]}
    lora_edge.export(found.base, own, "merged", tmp_path / "out", task=task, precision="int4")
    rows = [[5, 9, 13, 7, 21], [8, 4, 3, 60, 2]]
    merged = lora_edge.Runner(tmp_path / "out", exact=True).logits(rows)
    switchable = lora_edge.Runner(found.bundle, exact=True)
    np.testing.assert_allclose(merged, switchable.logits(rows, adapter=name), atol=3e-5)
    # The control: what ships is not as near.
    fast = lora_edge.Runner(tmp_path / "out").logits(rows)
    assert np.abs(merged - fast).max() > 1e-4
    # The layers that the adapter is merged into are in floats, all others are codes.
    before, after = _quantized(found.bundle), _quantized(tmp_path / "out")
    assert set(after) == {x for x in before if not any(part in x for part in touched)}
    assert len(after) < len(before)


@pytest.mark.parametrize(
    "layer", ["encoder.layer.1.attention.self.value", "embeddings.word_embeddings"]
)
def test_a_wrong_code_is_found_in_its_layer(
    layer: str, made: Callable[[str, str], Made], tmp_path: Path
) -> None:
    found, output = made("texts", "int4"), tmp_path / "out"
    shutil.copytree(found.bundle, output)
    (content,) = (
        x
        for x in contents(output / "onnx" / "model.onnx")
        if x.name.endswith(".codes")
        and f"bert.{layer}" in packed_paths(x.name.removesuffix(".weight.codes"))
    )
    name, offset, length = content.place  # type: ignore[misc]
    with (output / "onnx" / name).open("r+b") as data:
        data.seek(offset + length - 1)  # of those that are packed, value is the last
        (byte,) = data.read(1)
        data.seek(-1, 1)
        data.write(bytes([byte ^ 1]))
    signed(output)
    report = lora_edge.validate(output, reference=found.base, depth="quick")
    (case,) = [x for x in report.failures if x.kind == "weights" and "model.onnx:" in x.reason]
    assert f"bert.{layer}.weight (codes) differs from the checkpoint's in 1 of" in case.reason


@pytest.mark.parametrize("key", ["tokens", "embeddings"])
def test_too_much_drift_fails_and_is_not_laid_on_the_adapter(
    key: str, made: Callable[[str, str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = made(key, "int8")
    monkeypatch.setattr(
        "lora_edge.parity.drift.DriftLimits", lambda: DriftLimits(kl=1e-12, cosine=1 - 1e-9)
    )
    report = lora_edge.validate(found.bundle)
    assert report.exact
    assert {case.kind for case in report.failures} == {"drift"}
    said = "the cosine of its embeddings" if key == "embeddings" else "its KL divergence"
    assert all(said in case.reason for case in report.failures)
    assert all(report.adapter_passed(name) for name in ROWS[key].adapters)


def test_a_lost_effect_of_embeddings_is_drift(
    made: Callable[[str, str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = DriftLimits(retained=1 - 1e-9)
    monkeypatch.setattr("lora_edge.parity.drift.DriftLimits", lambda: own)
    report = lora_edge.validate(made("embeddings", "int8").bundle)
    assert [case.adapters for case in report.failures] == [("normed",), ("one",)]
    assert all("of its effect is there" in case.reason for case in report.failures)


def test_an_added_dora_has_the_norms_of_the_rounded_weights(
    made: Callable[[str, str], Made], tmp_path: Path
) -> None:
    found, output = made("texts", "int4"), tmp_path / "out"
    own = {"two": found.adapters["two"]}
    kinds = ("lora", "dora")
    lora_edge.export(found.base, own, output=output, kinds=kinds, precision="int4")
    lora_edge.add(output, {"dora": found.adapters["dora"]}, found.base)
    assert lora_edge.validate(output, reference=found.base).passed
    rows = [[5, 9, 13, 7]]
    added, whole = (
        lora_edge.Runner(x).logits(rows, adapter="dora") for x in (output, found.bundle)
    )
    np.testing.assert_allclose(added, whole, atol=1e-5)


def test_without_int8_activations_there_is_one_graph(
    made: Callable[[str, str], Made], tmp_path: Path
) -> None:
    found, output = made("texts", "int8"), tmp_path / "out"
    own = {"two": found.adapters["two"]}
    lora_edge.export(found.base, own, output=output, precision="int8", activations="fp32")
    assert not (output / "onnx" / "exact.onnx").exists()
    levels = _quantized(output).values()
    assert {level for each in levels for level in each} == {1}
    report = lora_edge.validate(output)
    assert report.passed
    assert not report.drift
    rows = [[5, 9, 13, 7]]
    exact = lora_edge.Runner(found.bundle, exact=True).logits(rows, adapter="two")
    np.testing.assert_allclose(
        lora_edge.Runner(output).logits(rows, adapter="two"), exact, atol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "named"), [({"form": "portable"}, "portable"), ({"backend": "optimum"}, "optimum")]
)
def test_other_graphs_are_refused_by_name(
    options: dict[str, Any], named: str, made: Callable[[str, str], Made], tmp_path: Path
) -> None:
    base = made("embeddings", "int8").base
    with pytest.raises(lora_edge.LoraEdgeError, match=f"int8.*{named}") as caught:
        lora_edge.export(
            base,
            {},
            output=tmp_path / "out",
            task="feature-extraction",
            precision="int8",
            **options,
        )
    assert "--precision fp32" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_model_with_nothing_to_round_is_refused(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3
    )
    base = save_model(transformers.ResNetForImageClassification(config), tmp_path / "base")
    size = {"crop_size": {"height": 32, "width": 32}}
    (base / "preprocessor_config.json").write_text(json.dumps(size))
    with pytest.raises(lora_edge.LoraEdgeError, match="can be rounded") as caught:
        lora_edge.export(
            base, {}, output=tmp_path / "out", task="image-classification", precision="int8"
        )
    assert "--precision fp32" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_width_of_no_whole_blocks_stays_in_floats(
    made: Callable[[str, str], Made], tmp_path: Path
) -> None:
    """Of an embedding; a linear layer's last block is filled up."""
    said: list[str] = []
    base = made("embeddings", "int8").base
    lora_edge.export(
        base, {}, output=tmp_path / "out", precision="int8", block_size=64, progress=said.append,
        task="feature-extraction",
    )  # fmt: skip
    assert any("embeddings.word_embeddings stays in fp32" in line for line in said)
    assert {x.split()[0] for x in _quantized(tmp_path / "out")} == {"MatMulNBits"}


def test_the_shipped_classifiers_at_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, base = tmp_path / "out", str(MODELS / "tiny-bert")
    own = [f"{name}={MODELS / 'classifiers' / name}" for name in ("claims", "letters")]
    words = [x for adapter in own for x in ("-a", adapter)]
    assert exit_code(["export", base, *words, "-o", str(output), "--precision", "int8"]) == 0
    assert "rounding 26 layers, 93% of the parameters" in capsys.readouterr().err
    lines = (MODELS / "data" / "classes" / "letters.jsonl").read_text().splitlines()[:8]
    rows = [json.loads(line) for line in lines]
    file = tmp_path / "rows.jsonl"
    asked = [{"text": row["text"], "adapter": "letters"} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    scores = []
    for extra in ([], ["--exact"]):
        assert exit_code(["run", str(output), "--input", str(file), *extra]) == 0
        found = [json.loads(line)["labels"][0] for line in capsys.readouterr().out.splitlines()]
        assert [x["label"] for x in found] == [row["label"] for row in rows]
        scores.append([x["score"] for x in found])
    assert scores[0] != scores[1]
    assert exit_code(["validate", str(output), "--quick"]) == 0
    assert "quantization drift" in capsys.readouterr().out
    assert exit_code(["inspect", str(output)]) == 0
    assert "26 layers to 8 bits" in capsys.readouterr().out


@pytest.mark.parametrize("exact", [False, True])
def test_a_metric_is_of_what_ships(
    exact: bool, made: Callable[[str, str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, seen = made("texts", "int4"), []

    def evaluated(runner: lora_edge.Runner, *_: Any) -> list[Case]:
        seen.append(Path(runner.graph_file).name)
        return []

    monkeypatch.setattr("lora_edge.parity.engine.check_examples", lambda *_: None)
    monkeypatch.setattr("lora_edge.parity.engine.evaluate", evaluated)
    lora_edge.validate(
        found.bundle, found.base, depth="quick", exact=exact, examples=[Example("a", "b", "two")]
    )
    assert seen == ["exact.onnx" if exact else "model.onnx"]
