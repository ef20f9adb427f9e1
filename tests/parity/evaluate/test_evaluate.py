"""Metrics on examples, paired: equal, different, and metrics that prove nothing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora_edge.bundle.bundle import Bundle, file_entries, load_bundle
from lora_edge.bundle.onnx_adapter import read_adapter, write_adapter
from lora_edge.errors import DataError
from lora_edge.exporting.export import export
from lora_edge.parity import Report, validate
from lora_edge.parity.case import Case
from lora_edge.parity.evaluate.evaluate import sign_test
from lora_edge.parity.plan.examples import Example, read_examples
from tests.support import shipped

COUNT = 12


def _examples(name: str, count: int = COUNT) -> list[Example]:
    found = read_examples(shipped.MODELS / "data" / f"{name}.jsonl")[:count]
    return [replace(example, adapter=name) for example in found]


def _task(report: Report, name: str) -> Case:
    (case,) = (x for x in report.cases if x.kind == "task" and x.adapters == (name,))
    assert case.task is not None
    return case


def _broken(directory: Path, name: str, factor: float) -> Bundle:
    """The adapter scaled, its hash made right again."""
    bundle = load_bundle(directory)
    file = directory / bundle.adapter(name).file
    tensors = read_adapter(file)
    scale = np.float32(factor)
    write_adapter(file, {k: v * (scale if k.endswith(".B") else 1) for k, v in tensors.items()})
    return bundle.write_manifest(replace(bundle.manifest, files=file_entries(directory)))


@pytest.mark.parametrize("metric", [None, "perplexity"])
def test_a_good_bundle_has_pytorchs_metric(shipped_bundle: Path, metric: str | None) -> None:
    examples = [*_examples("echo"), *_examples("mirror")]
    report = validate(
        shipped_bundle, shipped.BASE, depth="quick", steps=1, examples=examples, metric=metric
    )
    assert report.passed, report.table()
    for name in ("echo", "mirror"):
        figures = _task(report, name).task
        assert figures is not None
        assert (figures.better, figures.worse, figures.p) == (0, 0, 1.0)
        assert figures.bundle == pytest.approx(figures.reference, rel=1e-5)
        assert figures.examples == COUNT
        if metric is None:
            assert figures.metric == "exact_match"
            assert figures.reference >= 0.8
            assert figures.base <= 0.1
        else:
            assert figures.reference < 1.5 < figures.base


@pytest.mark.parametrize(
    "metric", ["exact_match", pytest.param("perplexity", marks=pytest.mark.long)]
)
def test_a_broken_adapter_is_worse_example_by_example(
    shipped_bundle: Path, tmp_path: Path, metric: str
) -> None:
    bundle = _broken(Path(shutil.copytree(shipped_bundle, tmp_path / "bundle")), "echo", -1)
    report = validate(
        bundle,
        shipped.BASE,
        depth="quick",
        steps=1,
        examples=[*_examples("echo"), *_examples("mirror")],
        metric=metric,
    )
    case = _task(report, "echo")
    assert case.status == "failed"
    assert case.task is not None
    assert case.task.worse >= COUNT - 2
    assert f"worse on {case.task.worse} and better on 0 of {COUNT}" in case.reason
    assert _task(report, "mirror").status == "passed"


def test_a_metric_that_does_not_show_the_adapter_proves_nothing(shipped_bundle: Path) -> None:
    examples = [replace(example, adapter="mirror") for example in _examples("echo")]
    report = validate(shipped_bundle, shipped.BASE, depth="quick", steps=1, examples=examples)
    case = _task(report, "mirror")
    assert case.status == "unproved"
    assert "does not show what the adapter does" in case.reason
    assert not report.passed
    # The logits have proved it all the same.
    assert load_bundle(shipped_bundle).adapter("mirror").proved
    few = validate(
        shipped_bundle, shipped.BASE, depth="quick", steps=1, examples=_examples("echo", 3)
    )
    assert _task(few, "echo").status == "unproved"  # three examples show nothing


def test_merged(tmp_path: Path) -> None:
    export(shipped.BASE, {"echo": shipped.ADAPTERS["echo"]}, "merged", tmp_path / "out")
    report = validate(
        tmp_path / "out", shipped.BASE, depth="quick", steps=1, examples=_examples("echo")
    )
    assert report.passed, report.table()
    figures = _task(report, "echo").task
    assert figures is not None
    assert figures.base < 0.2 < figures.reference


def test_accuracy_of_labels(tmp_path: Path) -> None:
    output = shipped.export_heads(tmp_path / "out")
    examples = [
        replace(example, adapter=name)
        for name in shipped.CLASSIFIERS
        for example in read_examples(shipped.MODELS / "data" / "classes" / f"{name}.jsonl")[:40]
    ]
    report = validate(output, shipped.BERT, examples=examples)
    assert report.passed, report.table()
    for name in shipped.CLASSIFIERS:
        figures = _task(report, name).task
        assert figures is not None
        assert figures.metric == "accuracy"
        assert figures.bundle == figures.reference > 0.85
    shutil.copytree(output, output.parent / "good")
    broken = _broken(output, "letters", 0)
    case = _task(validate(broken, shipped.BERT, examples=examples), "letters")
    assert case.status == "failed"
    for answer in ("nothing", "²", "7"):
        wrong = [replace(examples[0], answer=answer)]
        with pytest.raises(DataError, match=f"'{answer}' is none of"):
            validate(output, shipped.BERT, examples=wrong)
    # Few labels on few rows say little of the noise: with this seed the first probe's was too low.
    assert validate(output.parent / "good", shipped.BERT, seed=64).passed
    with pytest.raises(DataError, match="it has accuracy"):
        validate(output, shipped.BERT, examples=examples, metric="perplexity")


def test_bad_examples(shipped_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to compare"):
        validate(shipped_bundle, examples=_examples("echo"))
    with pytest.raises(DataError, match="'nobody'"):
        validate(
            shipped_bundle,
            shipped.BASE,
            steps=1,
            examples=[replace(_examples("echo")[0], adapter="nobody")],
        )
    with pytest.raises(DataError, match="no metric 'accuracy'"):
        validate(
            shipped_bundle, shipped.BASE, steps=1, examples=_examples("echo"), metric="accuracy"
        )
    file = tmp_path / "examples.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"jsonl:2: "):
        read_examples(file)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (0, 5), (0, 6), (3, 9), (7, 7), (40, 12)])
def test_the_sign_test_is_the_exact_binomial_one(better: int, worse: int) -> None:
    differences = np.array([1.0] * better + [-1.0] * worse + [1e-9, -1e-9, 0])
    found = sign_test(differences, np.full(len(differences), 1e-6))
    assert found[:2] == (better, worse)
    chances = np.ones(1)
    for _ in range(better + worse):
        chances = np.convolve(chances, [0.5, 0.5])
    as_unlikely = chances <= chances[better] * (1 + 1e-9)
    assert found[2] == pytest.approx(chances[as_unlikely].sum())
