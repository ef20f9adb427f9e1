"""A bundle with a fault, its hashes made right again, fails; the reason names the adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora_edge.base import Base
from lora_edge.bundle import Bundle, FileEntry, file_entries, hash_file, load_bundle
from lora_edge.exporter import add, export
from lora_edge.parity import validate
from lora_edge.parity.compare import Verdict
from lora_edge.runtime import write_adapter
from lora_edge.runtime.adapter_file import read_adapter

Tensors = dict[str, np.ndarray]
SOURCES = ("reference", "goldens")


@pytest.fixture(scope="module")
def good(base: Base, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("faults") / "good"
    export(base.directory, adapters, output=output, form="portable")  # head_dim 12
    return output


def _doubled(own: Tensors, _: Tensors) -> Tensors:
    return {key: value * np.float32(2 if key.endswith(".B") else 1) for key, value in own.items()}


def _swapped(_: Tensors, other: Tensors) -> Tensors:
    return other


def _one_site_zeroed(own: Tensors, _: Tensors) -> Tensors:
    site = max(key for key in own if key.endswith(".B") and np.any(own[key]))
    return own | {site: np.zeros_like(own[site])}


def _plain_scaling(own: Tensors, _: Tensors) -> Tensors:
    """alpha / r where rsLoRA's alpha / sqrt(r) is right, r = 5."""
    factor = np.float32(5**-0.5)
    return {key: value * (factor if key.endswith(".B") else 1) for key, value in own.items()}


def _with(good: Path, directory: Path, fault: Callable[[Tensors, Tensors], Tensors]) -> Bundle:
    shutil.copytree(good, directory)
    bundle = load_bundle(directory)
    files = {name: bundle.adapter(name).file for name in ("rooted", "varied")}
    own, other = (read_adapter(directory / file) for file in files.values())
    path = directory / files["rooted"]
    write_adapter(path, fault(own, other))
    entry = {files["rooted"]: FileEntry(hash_file(path), path.stat().st_size)}
    manifest = bundle.manifest
    return bundle.write_manifest(replace(manifest, files={**manifest.files, **entry}))


@pytest.mark.parametrize("source", SOURCES)
def test_the_bundle_without_a_fault_passes(good: Path, base: Base, source: str) -> None:
    report = validate(good, base if source == "reference" else None)
    assert report.passed, report.table()
    assert all(entry.proved for entry in load_bundle(good).manifest.adapters.values())


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("fault", [_doubled, _swapped, _one_site_zeroed, _plain_scaling])
def test_a_fault_fails(
    good: Path,
    base: Base,
    tmp_path: Path,
    fault: Callable[[Tensors, Tensors], Tensors],
    source: str,
) -> None:
    bundle = _with(good, tmp_path / "faulty", fault)
    report = validate(bundle, base if source == "reference" else None)
    alone = {case.adapters[0]: case for case in report.cases if case.name.startswith("adapter ")}
    assert not report.passed
    assert alone["rooted"].status == "failed"
    assert "rooted" in alone["rooted"].reason
    assert alone["narrow"].status == alone["varied"].status == "passed"


def test_an_adapter_without_effect_is_unproved(
    good: Path, base: Base, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """B = 0 on both sides: the numbers agree, and prove nothing."""
    import safetensors.numpy as st

    fresh = tmp_path / "fresh"
    shutil.copytree(adapters["rooted"], fresh)
    weights = fresh / "adapter_model.safetensors"
    tensors = st.load_file(weights)
    st.save_file({k: v * np.float32("lora_A" in k) for k, v in tensors.items()}, weights)
    shutil.copytree(good, tmp_path / "bundle")
    add(tmp_path / "bundle", {"fresh": fresh})
    assert not validate(tmp_path / "bundle").passed  # no goldens yet
    report = validate(tmp_path / "bundle", base)
    case = next(case for case in report.cases if case.name == "adapter fresh")
    assert not report.passed
    assert case.status == "unproved"
    assert "fresh" in case.reason
    assert "no effect" in case.reason
    assert not load_bundle(tmp_path / "bundle").adapter("fresh").proved


def test_a_failure_withdraws_the_proof_until_it_passes_again(
    good: Path, base: Base, tmp_path: Path
) -> None:
    bundle = _with(good, tmp_path / "bundle", _doubled)
    name = bundle.adapter("rooted").file
    assert bundle.adapter("rooted").proved
    assert not validate(bundle, base).passed
    withdrawn = load_bundle(bundle.directory)
    proved = {name: entry.proved for name, entry in withdrawn.manifest.adapters.items()}
    # The blend of narrow and rooted failed too, and that is rooted's fault alone.
    assert proved == {"narrow": True, "none": True, "rooted": False, "varied": True}
    withdrawn.verify_all()
    # With the right file again, the goldens agree, but PyTorch has not seen it since.
    shutil.copyfile(good / name, bundle.directory / name)
    entry = FileEntry(hash_file(good / name), (good / name).stat().st_size)
    withdrawn.write_manifest(
        replace(withdrawn.manifest, files={**withdrawn.manifest.files, name: entry})
    )
    report = validate(bundle.directory)
    assert [case.adapters for case in report.failures] == [("rooted",)]
    assert report.failures[0].status == "unproved"
    assert "did not pass" in report.failures[0].reason
    assert validate(bundle.directory, base).passed
    assert load_bundle(bundle.directory).adapter("rooted").proved
    assert validate(bundle.directory).passed


@pytest.fixture(scope="module")
def merged(
    base: Base, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Merged bundles by what is in their weights: the adapter once, twice, or not at all."""
    root = tmp_path_factory.mktemp("merged")
    twice = Path(shutil.copytree(adapters["rooted"], root / "twice-adapter"))
    config = json.loads((twice / "adapter_config.json").read_text())
    (twice / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 8}))
    found = {}
    for name, path in (("once", adapters["rooted"]), ("twice", twice)):
        found[name] = root / name
        export(base.directory, {"rooted": path}, "merged", root / name, form="portable")
    found["never"] = root / "never"
    export(base.directory, {}, output=root / "never", form="portable", sites="adapters")
    return found


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("graph", "words"), [("never", "does nothing"), ("twice", "times PyTorch's effect")]
)
def test_a_merged_bundle_with_another_graph_fails(
    graph: str, words: str, source: str, merged: dict[str, Path], base: Base, tmp_path: Path
) -> None:
    bundle = load_bundle(shutil.copytree(merged["once"], tmp_path / "bundle"))
    shutil.rmtree(bundle.directory / "onnx")
    shutil.copytree(merged[graph] / "onnx", bundle.directory / "onnx")
    bundle = bundle.write_manifest(replace(bundle.manifest, files=file_entries(bundle.directory)))
    report = validate(bundle, base if source == "reference" else None)
    (case,) = report.failures
    assert case.status == "failed"
    assert "rooted" in case.reason
    assert words in case.reason
    proved = load_bundle(bundle.directory).adapter("rooted").proved
    assert proved == (source == "goldens")  # PyTorch alone gives and takes the proof


@pytest.mark.parametrize("source", SOURCES)
def test_a_merged_bundle_has_controls(
    source: str, merged: dict[str, Path], base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = base if source == "reference" else None
    (case,) = validate(merged["once"], reference).cases
    assert case.status == "passed"
    assert case.controls is not None
    assert case.controls == pytest.approx({"absent": 1, "expected to do the opposite": 2}, rel=1e-3)

    def blind(*_: object, **__: object) -> Verdict:
        return Verdict("passed")

    monkeypatch.setattr("lora_edge.parity.checks.judge", blind)
    (case,) = validate(merged["once"]).cases
    assert case.status == "unproved"
    assert "absent or expected to do the opposite" in case.reason
