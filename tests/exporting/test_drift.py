"""Bundles of few bits that compute with int8 activations: what is proved, and what is measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import lora_edge
from lora_edge.bundle.bundle import load_bundle
from lora_edge.parity.drift import DriftLimits
from lora_edge.reports import html, junit, load_report, markdown
from tests.support.examples import examples
from tests.support.failing import signed
from tests.support.kinds import Made, make_kinds

IDS = np.random.default_rng(5).integers(0, 256, (2, 12))
NAMES = ("plain", "dora")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("drift")
    base, adapters = make_kinds("llama", root, NAMES)
    lora_edge.export(base, adapters, output=root / "bundle", precision="int4")
    return Made(base, adapters, root / "bundle")


def _levels(file: Path) -> set[int]:
    model = onnx.load(str(file), load_external_data=False)
    return {
        attribute.i
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    }


def test_the_graph_that_ships_computes_in_int8_and_another_in_floats(made: Made) -> None:
    levels = {
        name: _levels(made.bundle / "onnx" / f"{name}.onnx") for name in ("model", "base", "exact")
    }
    assert levels == {"model": {4}, "base": {4}, "exact": {1}}
    part = load_bundle(made.bundle).manifest.parts["decoder"]
    assert (part.file, part.exact) == ("onnx/model.onnx", "onnx/exact.onnx")
    fast, exact = lora_edge.Runner(made.bundle), lora_edge.Runner(made.bundle, exact=True)
    for adapter in (None, "plain"):
        off = np.abs(fast.logits(IDS, adapter=adapter) - exact.logits(IDS, adapter=adapter)).max()
        assert 1e-5 < off < 0.1
    effect = exact.logits(IDS, adapter="plain") - exact.logits(IDS)
    assert np.abs(effect).max() > 0.1


def test_drift_is_a_figure_of_its_own(made: Made, tmp_path: Path) -> None:
    report = lora_edge.validate(made.bundle)
    assert report.passed
    assert [case.adapters for case in report.drift] == [(), ("dora",), ("plain",)]
    for case in report.drift:
        assert case.figures is None
        assert case.drift is not None
        assert 0 < case.drift.kl < case.drift.kl_limit
        assert case.drift.logit_error > 1e-5
        assert case.drift.perplexity == pytest.approx(case.drift.exact_perplexity, rel=0.05)
        assert np.isnan(case.drift.retained) == (not case.adapters)
        if case.adapters:
            assert case.drift.retained == pytest.approx(1, abs=0.05)
            assert 0 < case.drift.effect_error < 0.5
    # What is proved is the graph in floats: its errors are a thousand times less.
    exact = [case.figures for case in report.cases if case.figures is not None]
    assert max(figures.logit_error for figures in exact) < 1e-4
    assert "quantization drift" in report.table()
    assert "drift within its limits in 3 of 3" in report.summary()
    (tmp_path / "r.json").write_text(report.to_json())
    data = load_report(tmp_path / "r.json")
    assert "Quantization drift" in html(data)
    assert "Quantization drift" in markdown(data)
    assert "drift, adapter plain" in junit(data)
    assert "onnx/exact.onnx" in (made.bundle / "README.md").read_text()
    alone = lora_edge.validate(made.bundle, exact=True, depth="quick")
    assert not alone.drift
    assert "--exact" in alone.command


def test_too_much_drift_fails_and_is_not_laid_on_the_adapter(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_edge.parity.drift.DriftLimits", lambda: DriftLimits(kl=1e-12))
    report = lora_edge.validate(made.bundle)
    assert not report.passed
    assert report.exact
    assert {case.kind for case in report.failures} == {"drift"}
    assert all("no fault of an adapter" in case.reason for case in report.failures)
    assert all(report.adapter_passed(name) for name in NAMES)
    (tmp_path / "r.json").write_text(report.to_json())
    assert "nats" in html(load_report(tmp_path / "r.json"))
    with pytest.raises(lora_edge.ParityError, match="int8 activations change too much") as caught:
        lora_edge.export(made.base, {}, output=tmp_path / "out", precision="int4")
    assert "--activations fp32" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_lost_effect_is_drift(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    own = DriftLimits(kl=10, retained=1 - 1e-9)
    monkeypatch.setattr("lora_edge.parity.drift.DriftLimits", lambda: own)
    report = lora_edge.validate(made.bundle)
    assert [case.adapters for case in report.failures] == [("dora",), ("plain",)]
    assert all("of its effect is there" in case.reason for case in report.failures)


def test_wrong_codes_are_no_drift(made: Made, tmp_path: Path) -> None:
    """A damage that both graphs share is found in the graph in floats, and drift stays small."""
    shutil.copytree(made.bundle, tmp_path / "out")
    data = json.loads((tmp_path / "out" / "lora_edge.json").read_text())
    data["quantization"]["bits"] = 8
    (tmp_path / "out" / "lora_edge.json").write_text(json.dumps(data))
    report = lora_edge.validate(tmp_path / "out", reference=made.base, depth="quick")
    assert not report.exact
    assert all(case.status == "passed" for case in report.drift)


def test_the_graph_that_ships_is_the_one_that_is_proved(made: Made, tmp_path: Path) -> None:
    """A small damage of the one that ships might pass for drift."""
    shutil.copytree(made.bundle, tmp_path / "out")
    file = tmp_path / "out" / "onnx" / "model.onnx"
    model = onnx.load(str(file), load_external_data=False)
    node = next(node for node in model.graph.node if node.name.endswith("q_proj.gated"))
    node.input[0], node.input[1] = node.input[1], node.input[0]  # a product all the same
    onnx.save(model, str(file))
    signed(tmp_path / "out")
    report = lora_edge.validate(tmp_path / "out", reference=made.base, depth="quick")
    (case,) = [case for case in report.failures if case.kind == "weights" and case.figures is None]
    assert "are not one graph" in case.reason
    assert all(case.status == "passed" for case in report.drift)


@pytest.mark.parametrize("name", examples(["plain", "dora"], ["plain"]))
def test_a_merged_bundle_drifts_too(name: str, made: Made, tmp_path: Path) -> None:
    own = {name: made.adapters[name]}
    lora_edge.export(made.base, own, "merged", tmp_path / "out", precision="int4")
    report = lora_edge.validate(tmp_path / "out")
    assert report.passed
    (case,) = [case for case in report.drift if case.adapters]
    assert case.drift is not None
    assert case.drift.retained == pytest.approx(1, abs=0.05)


def test_without_int8_activations_there_is_one_graph(made: Made, tmp_path: Path) -> None:
    output = tmp_path / "out"
    lora_edge.export(made.base, {}, output=output, precision="int4", activations="fp32")
    assert _levels(output / "onnx" / "model.onnx") == {1}
    assert not (output / "onnx" / "exact.onnx").exists()
    assert not lora_edge.validate(output).drift
    # Bundles from before know no other graph.
    data = json.loads((output / "lora_edge.json").read_text())
    del data["parts"]["decoder"]["exact"]
    for key in ("bits_of", "symmetric", "algorithm"):
        del data["quantization"][key]
    (output / "lora_edge.json").write_text(json.dumps(data))
    runner, exact = lora_edge.Runner(output), lora_edge.Runner(output, exact=True)
    np.testing.assert_array_equal(runner.logits(IDS), exact.logits(IDS))


def test_pinned_sessions_are_not_exact(made: Made) -> None:
    with pytest.raises(lora_edge.DataError, match="nothing can be pinned with exact"):
        lora_edge.Runner(made.bundle, exact=True, pinned=[None])
    pinned = lora_edge.Runner(made.bundle, pinned=[None])
    np.testing.assert_array_equal(pinned.logits(IDS), lora_edge.Runner(made.bundle).logits(IDS))


def test_the_command_asks_for_the_graph_in_floats(made: Made) -> None:
    from lora_edge.cli.run import command

    words = [str(made.bundle), "-p", "x", "--exact", "--pin", "none"]
    found = CliRunner().invoke(command, words)
    assert isinstance(found.exception, lora_edge.DataError)
    assert "with exact" in str(found.exception)
