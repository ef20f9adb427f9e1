"""Bundles of every task without a cache: classification of texts, tokens and images, embeddings."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

import lora_edge
from lora_edge.bundle.bundle import file_entries, load_bundle
from lora_edge.bundle.onnx_adapter import read_adapter, write_adapter
from lora_edge.cli import main
from lora_edge.parity.checks import compare
from lora_edge.parity.compare import Tolerance
from lora_edge.parity.record.golden import recorded
from tests.support.blends import asked_of
from tests.support.encoders import load_encoder, make_encoder, make_encoder_adapter
from tests.support.exactness import exact_case
from tests.support.examples import examples
from tests.support.paths import MODELS
from tests.support.shipped import export_heads

pytestmark = pytest.mark.skipif(
    transformers.__version__ < "5", reason="the small encoders are made with transformers 5"
)
_TYPES = {
    "text-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "feature-extraction": "FEATURE_EXTRACTION",
}
Settings = dict[str, Any]
# family, task, adapter -> its number of labels and settings
CASES: dict[str, tuple[str, str, dict[str, tuple[int, Settings]]]] = {
    "bert-texts": (
        "bert",
        "text-classification",
        {
            "two": (2, {"target_modules": ["query", "value"]}),
            "five": (5, {"target_modules": ["query", "dense"], "use_dora": True}),
            "biased": (3, {"target_modules": ["key"], "bias": "all"}),
        },
    ),
    "bert-tokens": (
        "bert",
        "token-classification",
        {
            "three": (3, {"target_modules": ["query", "output.dense"], "use_rslora": True}),
            "four": (4, {"target_modules": ["word_embeddings", "value"]}),
        },
    ),
    "bert-embeddings": (
        "bert",
        "feature-extraction",
        {
            "one": (0, {"target_modules": ["query", "value"]}),
            "two": (0, {"target_modules": ["key", "output.dense"], "r": 5, "use_rslora": True}),
            "normed": (0, {"target_modules": ["query"], "modules_to_save": ["LayerNorm"]}),
        },
    ),
    "vit-images": (
        "vit",
        "image-classification",
        {
            "linear": (4, {"target_modules": ["q_proj", "v_proj"]}),
            "patches": (2, {"target_modules": ["projection"], "use_dora": True}),
        },
    ),
    "roberta-texts": (
        "roberta",
        "text-classification",
        {"two": (2, {"target_modules": ["query", "value"]})},
    ),
    "llama-texts": (
        "llama",
        "text-classification",
        {"three": (3, {"target_modules": ["q_proj", "down_proj"]})},
    ),
}


@dataclasses.dataclass(frozen=True)
class Made:
    """A base, its adapters and their bundle."""

    base: Path
    task: str
    adapters: dict[str, Path]
    bundle: Path


def _adapter(base: Path, task: str, labels: int, settings: Settings, directory: Path) -> Path:
    fields = {"task_type": _TYPES.get(task), **settings}
    if task == "image-classification":  # PEFT adds the head by itself for texts only
        fields["modules_to_save"] = ["classifier"]
    seed = labels or len(directory.name)
    return make_encoder_adapter(base, task, directory, labels, seed, **fields)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    cache: dict[str, Made] = {}

    def make(case: str) -> Made:
        if case not in cache:
            family, task, wanted = CASES[case]
            root = tmp_path_factory.mktemp(case)
            base = make_encoder(family, task, root / "base")
            adapters = {
                name: _adapter(base, task, labels, settings, root / name)
                for name, (labels, settings) in wanted.items()
            }
            lora_edge.export(base, adapters, output=root / "out", task=task)
            cache[case] = Made(base, task, adapters, root / "out")
        return cache[case]

    return make


_SHORT = [case for case in CASES if case != "roberta-texts"]  # as BERT


@pytest.mark.parametrize("case", examples(CASES, _SHORT))
def test_switchable(case: str, made: Callable[[str], Made]) -> None:
    """The export proved it against PyTorch; here from the goldens, with the effects seen."""
    found = made(case)
    report = lora_edge.validate(found.bundle)
    assert report.passed, report.table()
    for name in found.adapters:
        figures = exact_case(report, name, 0.01)
        assert figures.controls
        assert min(figures.controls.values()) > 0.1
    mixed = [x for x in report.cases if x.name.startswith("mixed row")]
    blended = {("one", "two")} if case == "bert-embeddings" else set()
    alone = {(name,) for name in found.adapters}
    assert {x.adapters for x in mixed if x.adapters} == alone | blended
    blends = [x for x in report.cases if x.name.startswith("blend")]
    assert {x.adapters for x in blends} == blended  # a task head is replaced, and not blended


@pytest.mark.parametrize("case", examples(CASES, [x for x in _SHORT if x != "llama-texts"]))
def test_merged(case: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    found = made(case)
    name = list(found.adapters)[-1]
    lora_edge.export(
        found.base, {name: found.adapters[name]}, "merged", tmp_path / "out", task=found.task
    )
    assert lora_edge.validate(tmp_path / "out").passed


def test_heads_of_unequal_sizes_mix_by_row(made: Callable[[str], Made]) -> None:
    found = made("bert-texts")
    runner = lora_edge.Runner(found.bundle)
    rows = [[5, 9, 13, 7], [8, 4], [11, 3, 6], [5, 9]]
    states = ["two", "five", "biased", "none"]
    mixed = runner.logits(rows, adapter=states)
    assert mixed.shape == (4, 5)
    sizes = [runner.logits([rows[i]], adapter=state).shape[1] for i, state in enumerate(states)]
    assert sizes[:3] == [2, 5, 3]
    for index, (state, size) in enumerate(zip(states, sizes, strict=True)):
        alone = runner.logits([rows[index]], adapter=state)[0]
        np.testing.assert_allclose(mixed[index, :size], alone, atol=1e-5)
        assert not mixed[index, size:].any()
        reference = load_encoder(found.base, found.task, size)
        if state != "none":
            reference = PeftModel.from_pretrained(reference, found.adapters[state])
        with torch.inference_mode():
            expected = reference(input_ids=torch.tensor([rows[index]])).logits[0].numpy()
        np.testing.assert_allclose(alone, expected, atol=1e-5)


def test_a_lost_low_rank_part_does_not_hide_behind_the_head(
    made: Callable[[str], Made], tmp_path: Path
) -> None:
    found = made("bert-texts")
    broken = Path(shutil.copytree(found.bundle, tmp_path / "broken"))
    file = broken / "adapters" / "two" / "adapter.onnx_adapter"
    own = read_adapter(file)
    write_adapter(file, {k: v * np.float32(not k.endswith(".B")) for k, v in own.items()})
    bundle = load_bundle(broken)
    bundle.write_manifest(dataclasses.replace(bundle.manifest, files=file_entries(broken)))
    report = lora_edge.validate(broken)
    case = next(x for x in report.cases if x.name == "adapter two")
    assert case.status == "failed"
    assert "does nothing" in case.reason


def test_a_base_without_a_head_needs_an_adapter_that_brings_one(tmp_path: Path) -> None:
    base = make_encoder("bert", "feature-extraction", tmp_path / "base")
    task = "text-classification"
    adapter = _adapter(base, task, 3, {"target_modules": ["query"]}, tmp_path / "a")
    lora_edge.export(base, {"a": adapter}, output=tmp_path / "out")
    runner = lora_edge.Runner(tmp_path / "out")
    assert runner.bundle.manifest.task == task
    assert runner.logits([[5, 6]], adapter="a").shape == (1, 3)
    with pytest.raises(lora_edge.DataError, match="no task head"):
        runner.logits([[5, 6]])
    with pytest.raises(lora_edge.AdapterError, match="has no task head"):
        lora_edge.export(base, {}, output=tmp_path / "none", task=task)
    assert not (tmp_path / "none").exists()


def test_a_blend_of_embeddings_is_proved(made: Callable[[str], Made]) -> None:
    """Against PyTorch, from the goldens, and not where a weight is another."""
    found = made("bert-embeddings")
    for report in (
        lora_edge.validate(found.bundle),
        lora_edge.validate(found.bundle, reference=found.base),
    ):
        case = next(x for x in report.cases if x.name == "blend 0.7 one + 0.3 two")
        assert case.status == "passed", case.reason
        assert case.figures is not None
        assert case.figures.effect_error <= 1e-4
        assert case.figures.effect_max > 0.01
    runner = lora_edge.Runner(found.bundle)
    golden = next(x for x in recorded(runner.bundle) if x.probe.name == "blend 0.7 one + 0.3 two")
    for wrong in ({"one": 0.3, "two": 0.7}, {"one": 0.7}, {"one": 0.7, "two": 0.29}):
        (case,) = compare(runner, asked_of(golden, wrong), Tolerance())
        assert case.status == "failed", wrong
    (case,) = compare(runner, golden, Tolerance())
    assert case.status == "passed"
    classifiers = lora_edge.Runner(made("bert-texts").bundle)
    with pytest.raises(lora_edge.DataError, match="its task head replaces the base's"):
        classifiers.logits([[5, 9]], adapter={"two": 0.5, "biased": 0.5})


def test_embeddings_are_blended_and_pooled(made: Callable[[str], Made]) -> None:
    runner = lora_edge.Runner(made("bert-embeddings").bundle)
    ids = [[5, 9, 13, 7]]
    half = runner.logits(ids, adapter={"one": 0.5})
    assert half.shape == runner.logits(ids).shape
    assert np.abs(half - runner.logits(ids)).max() > 1e-3
    with pytest.raises(lora_edge.BundleError, match="has no labels"):
        runner.classify(["text"])
    with pytest.raises(lora_edge.BundleError, match="generates no text"):
        runner.generate("text")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_heads(tmp_path_factory.mktemp("shipped") / "out")


def _run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0)


def test_the_shipped_classifiers_at_the_command_line(
    shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (MODELS / "data" / "classes" / "letters.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:8]]
    assert _run(["run", str(shipped), "-a", "letters", "--text", rows[0]["text"]]) == 0
    label, score = capsys.readouterr().out.splitlines()[0].split("\t")
    assert label == rows[0]["label"]
    assert float(score) > 0.5
    claims = (MODELS / "data" / "classes" / "claims.jsonl").read_text().splitlines()
    both = [{"text": row["text"], "adapter": "letters"} for row in rows]
    both.append({"text": json.loads(claims[0])["text"], "adapter": "claims"})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in both))
    assert _run(["run", str(shipped), "--input", str(file)]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [x["labels"][0]["label"] for x in found[:-1]] == [row["label"] for row in rows]
    assert found[-1]["labels"][0]["label"] == json.loads(claims[0])["label"]
    assert [len(x["labels"]) for x in found] == [4] * 8 + [2]
    assert _run(["run", str(shipped), "-a", "letters", "-p", "x"]) == 2
    assert "--text" in capsys.readouterr().err


def test_the_shipped_classifiers_are_held_to_1e_4(shipped: Path) -> None:
    report = lora_edge.validate(shipped, reference=MODELS / "tiny-bert")
    assert report.passed, report.table()
    for case in report.cases:
        if case.figures is not None:
            assert case.figures.logit_error <= 1e-4
            assert case.figures.effect_error <= 1e-4


def test_images_at_the_command_line(
    made: Callable[[str], Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = pytest.importorskip("PIL.Image", reason="needs lora-edge[image]")
    found = made("vit-images")
    bundle = Path(shutil.copytree(found.bundle, tmp_path / "bundle"))
    processor = transformers.ViTImageProcessor(size={"height": 24, "width": 24})
    processor.save_pretrained(bundle)
    opened = load_bundle(bundle)
    opened.write_manifest(dataclasses.replace(opened.manifest, files=file_entries(bundle)))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    image.fromarray(pixels).save(tmp_path / "x.png")
    command = ["run", str(bundle), "-a", "linear", "--image", str(tmp_path / "x.png"), "--json"]
    assert _run([*command, "--top", "2"]) == 0
    labels = json.loads(capsys.readouterr().out)["labels"]
    assert len(labels) == 2
    assert labels[0]["score"] >= labels[1]["score"] > 0
