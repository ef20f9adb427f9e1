"""A large model's graphs run in parts while they are checked, and what is wrong is found alike."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from lora_edge.base.checkpoint import Base, resolve_base
from lora_edge.bundle.bundle import Bundle, file_entries, load_bundle
from lora_edge.capture import capture
from lora_edge.errors import CaptureError, OptionError, ParityError
from lora_edge.exporting.export import export
from lora_edge.files.json import read_object
from lora_edge.parity import by_layer, engine, in_parts, in_session, validate
from lora_edge.parity.checks import compare
from lora_edge.parity.in_parts import fewer_prompts
from lora_edge.parity.plan.examples import Example
from lora_edge.parity.record.environment import Opening
from lora_edge.parity.record.golden import Golden
from lora_edge.runtime import Runner, segmented
from tests.support.checks import checked
from tests.support.paths import ROOT

TWO = ("narrow", "rooted")


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is large, and every weight a part of its own."""
    monkeypatch.setattr(by_layer, "WHOLE", 0)
    monkeypatch.setattr(in_parts, "_BYTES", 1)
    monkeypatch.setattr(segmented, "_KEPT", 20_000)


@pytest.mark.parametrize("form", ["fused", "portable"])
def test_the_base_check_is_as_strict(
    base: Base, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c").mkdir()
    graph = capture(base, tmp_path / "c", form=form)  # type: ignore[arg-type]
    whole = checked(graph, base)
    monkeypatch.setattr(by_layer, "WHOLE", 0)
    monkeypatch.setattr(in_parts, "_BYTES", 1)
    parts = checked(graph, base)
    assert parts["cases"].keys() == whole["cases"].keys()
    assert parts["limit"] == pytest.approx(whole["limit"], rel=0.5)
    for name, case in parts["cases"].items():
        assert case["logit_error"] <= whole["limit"], name
    model = onnx.load(graph.path())
    for tensor in model.graph.initializer:
        if tensor.name == "model.layers.1.mlp.down_proj.weight":
            values = numpy_helper.to_array(tensor) * np.float32(1.0001)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    off = replace(graph, folder=tmp_path / "off")
    off.folder.mkdir()
    onnx.save(model, off.path())
    with pytest.raises(CaptureError, match="differs from PyTorch"):
        checked(off, base)


def _exported(base: Base, adapters: dict[str, Path], folder: Path) -> Path:
    two = {name: adapters[name] for name in TWO}
    return export(base.directory, two, output=folder / "out", low_memory=True).directory


@pytest.mark.usefixtures("large")
def test_an_export_is_proved_in_parts(
    base: Base, adapters: dict[str, Path], tmp_path: Path
) -> None:
    output = _exported(base, adapters, tmp_path)
    assert all(load_bundle(output).adapter(name).proved for name in TWO)
    report = validate(output, base.directory, low_memory=True)
    assert report.passed
    assert "--low-memory" in report.command
    assert report.sessions[0].parts > 10
    assert report.to_data()["sessions"][0]["parts"] == report.sessions[0].parts
    assert report.sessions[0].placement is not None
    for again in (validate(output), validate(output, base.directory, depth="quick")):
        assert again.passed  # on the whole graph
        assert "parts" not in again.to_data()["sessions"][0]
    with pytest.raises(OptionError, match="False without a reference"):
        validate(output, low_memory=True)


@pytest.mark.usefixtures("large")
def test_a_wrong_adapter_is_found_and_explained(
    base: Base, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """The explanation runs the session again, watched, and a graph like it."""
    output = _exported(base, adapters, tmp_path)
    data = output / "onnx" / "model.onnx_data"
    values = np.fromfile(data, np.float32)
    manifest = read_object(output / "lora_edge.json", CaptureError, "")
    site = next(x for x in manifest["parts"]["decoder"]["sites"].values() if x.get("weight"))
    start = site["weight"]["offset"] // 4
    values[start : start + 64] *= 1.5
    values.tofile(data)
    broken = load_bundle(output)
    files = file_entries(output)
    Bundle(output, broken.manifest).write_manifest(replace(broken.manifest, files=files))
    report = validate(
        output, base.directory, repro=tmp_path / "repro", depth="quick", low_memory=True
    )
    assert not report.passed
    failed = [case for case in report.cases if case.status == "failed"]
    assert any(case.kind == "weights" for case in failed)
    assert any(case.figures is not None for case in failed)
    assert (tmp_path / "repro").is_dir()


@pytest.mark.usefixtures("large")
def test_models_of_labels_and_few_bits(tmp_path: Path) -> None:
    """An encoder's graph is cut for its base check; one of few bits is proved whole."""
    models = ROOT / "models"
    tiny = models / "tiny-llama"
    export(tiny, {"shout": models / "adapters" / "shout"}, output=tmp_path / "i", precision="int4")
    report = validate(tmp_path / "i", tiny, depth="quick", low_memory=True)
    assert report.passed
    assert report.sessions[0].parts == 1
    assert report.reach is not None
    assert report.reach.fewer == ""
    export(
        models / "tiny-bert",
        {"mood": sorted((models / "classifiers").iterdir())[0]},
        output=tmp_path / "b",
    )


@pytest.mark.usefixtures("large")
def test_few_bits_of_a_very_large_base_are_proved_on_fewer_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report says so; what is asked for as a whole is whole, and so is what is in float32."""
    base, made = ROOT / "models" / "tiny-llama", tmp_path / "made"
    monkeypatch.setattr(in_parts, "VERY_LARGE", 1_000_000)  # it has a little more
    said: list[str] = []
    shout = {"shout": ROOT / "models" / "adapters" / "shout"}
    export(base, shout, output=made, precision="int4", low_memory=True, progress=said.append)
    why = "Fewer prompts than usual, those of --quick, because of --low-memory"
    assert any(line.startswith(why) for line in said)
    kept = read_object(next(made.glob("parity/report-*.json")), ParityError, "")
    assert kept["settings"]["depth"] == "quick"
    assert kept["reach"]["decoded"] == 8
    assert kept["reach"]["batches"] == [4, 8]
    assert kept["reach"]["line"].endswith(f"{kept['reach']['fewer']}.")
    assert load_bundle(made).adapter("shout").proved
    assert validate(made).passed

    found = load_bundle(made).manifest.quantization
    assert fewer_prompts(resolve_base(base), found, "full") == ""
    assert fewer_prompts(resolve_base(base), None, "normal") == ""
    monkeypatch.setattr(in_parts, "VERY_LARGE", 2_000_000)
    assert fewer_prompts(resolve_base(base), found, "normal") == ""


def test_one_copy_of_the_weights_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drift is measured with the session that ships, after the one in floats has ended."""
    monkeypatch.setattr(engine, "_LARGE", 0)
    opened: list[tuple[bool, weakref.ref[Any]]] = []
    open_one = Opening.runner

    def watched(self: Opening, *given: Any, exact: bool = True, **more: Any) -> Runner:
        assert [kind for kind, session in opened if session() is not None] == []
        runner = open_one(self, *given, exact=exact, **more)
        opened.append((exact, weakref.ref(runner.session)))
        return runner

    monkeypatch.setattr(Opening, "runner", watched)
    base, made = ROOT / "models" / "tiny-llama", tmp_path / "made"
    export(base, {"shout": ROOT / "models" / "adapters" / "shout"}, output=made, precision="int4")
    assert [exact for exact, _ in opened] == [True, False]
    opened.clear()
    report = validate(
        made, base, depth="quick", examples=[Example("Word: river Answer:", "RIVER!", "shout")]
    )
    assert all(case.status == "passed" for case in report.cases if case.kind != "task")
    assert [exact for exact, _ in opened] == [True, False, False]


@pytest.mark.usefixtures("large")
def test_what_ran_whole_is_not_gone_on_with_in_parts(
    base: Base, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, folder = _exported(base, adapters, tmp_path), tmp_path / "finished"
    compared: list[str] = []

    def cut_off(runner: Runner, golden: Golden, *rest: Any) -> Any:
        if len(compared) == 2:
            raise KeyboardInterrupt
        compared.append(golden.probe.name)
        return compare(runner, golden, *rest)

    def counted(runner: Runner, golden: Golden, *rest: Any) -> Any:
        compared.append(golden.probe.name)
        return compare(runner, golden, *rest)

    monkeypatch.setattr(in_session, "compare", cut_off)
    with pytest.raises(KeyboardInterrupt):
        validate(output, base.directory, depth="quick", resume=folder)
    first = list(compared)
    monkeypatch.setattr(in_session, "compare", counted)
    report = validate(output, base.directory, depth="quick", resume=folder, low_memory=True)
    assert report.passed
    assert compared[2:4] == first  # again, in parts
