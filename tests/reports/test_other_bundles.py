"""Reports of other bundles, and of figures that are not finite: every format takes them."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from junitparser import JUnitXml

import lora_edge
from lora_edge.parity.plan.examples import read_examples
from lora_edge.reports import html, junit, markdown
from tests.support import shipped

Data = dict[str, Any]
SCHEMA = json.loads(
    files("lora_edge.reports").joinpath("report.schema.json").read_text(encoding="utf-8")
)


def _all(data: Data) -> tuple[str, str, str]:
    """Every format, of a report that follows the schema."""
    jsonschema.validate(data, SCHEMA)
    xml = junit(data)
    assert JUnitXml.fromstring(xml.encode()).tests == len(data["cases"])
    return html(data), xml, markdown(data)


def test_a_merged_bundle(tmp_path: Path) -> None:
    output = tmp_path / "merged"
    lora_edge.export(shipped.BASE, {"echo": shipped.ADAPTERS["echo"]}, output=output, mode="merged")
    data = lora_edge.validate(output).to_data()
    assert data["mode"] == "merged"
    page, _, text = _all(data)
    for each in (page, text):
        assert "merged, base" in each


def test_classifiers(tmp_path: Path) -> None:
    output = shipped.export_heads(tmp_path / "classifiers")
    page, _, text = _all(lora_edge.validate(output).to_data())
    for name in shipped.CLASSIFIERS:
        assert f'<th scope="row" title="{name}">{name}</th>' in page
        assert f"| {name} | ✅" in text


@pytest.fixture(scope="module")
def measured(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Data:
    """A report with a metric."""
    own = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("measured") / "bundle"))
    data = shipped.MODELS / "data" / "echo.jsonl"
    examples = [dataclasses.replace(x, adapter="echo") for x in read_examples(data)[:8]]
    return lora_edge.validate(own, shipped.BASE, steps=1, examples=examples).to_data()


def test_a_metric(measured: Data) -> None:
    (case,) = (case for case in measured["cases"] if case["task"])
    page, _, _ = _all(measured)
    assert "On your own examples" in page
    assert "task metric" in page
    assert f"<td>{case['task']['bundle']:.4g}</td>" in page


def _of_layers(data: Data) -> None:
    case = next(case for case in data["cases"] if case["kind"] == "adapter")
    layer = {"path": "model.layers.0", "error": 1e-7, "floor": 1e-7, "limit": 1e-6}
    case["layers"] = [layer, {**layer, "path": "model.layers.1", "error": None}]


def _of_logits(data: Data) -> None:
    for case in data["cases"]:
        if case["figures"]:
            names = ("logit_error", "effect_error", "gain", "kl", "error_spread", "top1")
            case["figures"] |= dict.fromkeys(names)


def _of_a_metric(data: Data) -> None:
    next(case for case in data["cases"] if case["task"])["task"]["bundle"] = None


def _of_nothing(data: Data) -> None:
    data |= {"cases": [], "sessions": [], "settings": {}, "adapters": []}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_of_layers, "model.layers.1"),
        (_of_logits, "cases are not finite and cannot be drawn"),
        (_of_a_metric, "not finite"),
        (_of_nothing, "Nothing was compared"),
    ],
)
def test_figures_that_are_not_finite(
    measured: Data, change: Callable[[Data], None], words: str
) -> None:
    data = copy.deepcopy(measured)
    for case in data["cases"]:
        case["status"], case["reason"] = "failed", f"{case['name']}: not a number"
    data["passed"] = False
    change(data)
    page, xml, text = _all(data)
    assert words in page
    if change is not _of_nothing:
        assert "not a number" in xml
        assert "not a number" in text
