"""What validate leaves behind of a failure: the layer where it begins, and a reproduction."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora_edge.base.checkpoint import Base
from lora_edge.bundle.bundle import Bundle, file_entries, load_bundle
from lora_edge.bundle.onnx_adapter import read_adapter, write_adapter
from lora_edge.parity import validate

SITE = "model.layers.1.self_attn.v_proj"


@pytest.fixture
def faulty(exported: Path, tmp_path: Path) -> Bundle:
    """One site of one adapter zeroed, its hash made right again."""
    directory = Path(shutil.copytree(exported, tmp_path / "faulty"))
    bundle = load_bundle(directory)
    file = directory / bundle.adapter("rooted").file
    tensors = read_adapter(file)
    key = f"lora.{SITE}.B"
    assert tensors[key].any()
    write_adapter(file, {**tensors, key: np.zeros_like(tensors[key])})
    return bundle.write_manifest(replace(bundle.manifest, files=file_entries(directory)))


def test_with_pytorch_the_layer_is_named(faulty: Bundle, base: Base, tmp_path: Path) -> None:
    report = validate(faulty, base, steps=3, repro=tmp_path / "repro")
    case = next(case for case in report.failures if case.name == "adapter rooted")
    assert f"the first layer that differs is {SITE} " in case.reason
    first = next(layer for layer in case.layers if layer.error > layer.limit)
    assert first.path == SITE
    assert all(layer.error <= layer.limit for layer in case.layers[: case.layers.index(first)])
    # Rows and blends of an adapter that fails alone say no more than that.
    others = [case for case in report.failures if case.kind in {"blend", "mixed"}]
    assert others
    assert not any(case.layers for case in others)
    assert not any(case.layers for case in report.cases if case.status == "passed")
    assert report.repro == str(tmp_path / "repro")
    layers = json.loads((tmp_path / "repro" / "layers.json").read_text())
    assert SITE in json.dumps(layers)


def test_without_pytorch_the_reproduction_is_left(faulty: Bundle, tmp_path: Path) -> None:
    repro = tmp_path / "repro"
    report = validate(faulty, repro=repro)
    assert not report.passed
    assert report.repro == str(repro)
    assert not any(case.layers for case in report.cases)
    done = subprocess.run([sys.executable, str(repro / "repro.py")], check=False)
    assert done.returncode == 1
    assert not validate(faulty).passed  # none is asked for
    shutil.rmtree(repro)
    repro.mkdir()
    (repro / "letter.txt").write_text("mine")
    lines: list[str] = []
    again = validate(faulty, repro=repro, progress=lines.append)
    assert (again.passed, again.repro) == (False, "")
    assert any("no reproduction is left" in line for line in lines)
    assert (repro / "letter.txt").read_text() == "mine"


def test_a_bundle_that_passes_leaves_nothing(exported: Path, base: Base, tmp_path: Path) -> None:
    report = validate(exported, base, steps=3, repro=tmp_path / "repro")
    assert report.passed
    assert report.repro == ""
    assert not (tmp_path / "repro").exists()
    assert not any(case.layers for case in report.cases)


def test_a_base_that_differs_explains_all_others(
    exported: Path, base: Base, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(exported, tmp_path / "faulty"))
    import onnx
    from onnx import numpy_helper

    model = onnx.load(directory / "onnx" / "model.onnx")
    weights = {x.name: x for x in model.graph.initializer}
    name = next(x for x in weights if "layers.1.mlp.down_proj" in x)
    array = numpy_helper.to_array(weights[name]) * np.float32(1.01)
    weights[name].CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, directory / "onnx" / "model.onnx", save_as_external_data=False)
    bundle = load_bundle(directory)
    bundle.write_manifest(replace(bundle.manifest, files=file_entries(directory)))
    report = validate(directory, base, steps=3)
    explained = {case.name for case in report.cases if case.layers}
    assert explained == {"base"}
    case = next(case for case in report.cases if case.name == "base")
    assert "the first layer that differs is model.layers.1.mlp.down_proj " in case.reason


def test_a_neighbour_of_nan_keeps_its_proof(exported: Path, base: Base, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(exported, tmp_path / "faulty"))
    bundle = load_bundle(directory)
    file = directory / bundle.adapter("rooted").file
    tensors = read_adapter(file)
    key = f"lora.{SITE}.B"
    write_adapter(file, {**tensors, key: np.full_like(tensors[key], np.nan)})
    bundle.write_manifest(replace(bundle.manifest, files=file_entries(directory)))
    report = validate(directory, base, steps=2)
    assert not report.passed
    proved = {
        name: entry.proved for name, entry in load_bundle(directory).manifest.adapters.items()
    }
    assert proved["narrow"]
    assert not proved["rooted"]
    switched = [case for case in report.cases if case.kind == "switch"]
    assert all(case.status == "passed" for case in switched)


def test_a_file_in_the_way_of_the_reproduction_stays(faulty: Bundle, tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "repro.py").write_text("mine")
    for name in ("letter", "folder"):
        report = validate(faulty, repro=tmp_path / name)
        assert (report.passed, report.repro) == (False, "")
    assert (tmp_path / "letter").read_text() == "mine"
    assert (tmp_path / "folder" / "repro.py").read_text() == "mine"
