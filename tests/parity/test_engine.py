"""Validation of whole bundles: what is recorded when, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lora_edge.base.checkpoint import Base
from lora_edge.bundle.bundle import load_bundle
from lora_edge.errors import AdapterError, BundleError
from lora_edge.exporting.add import add
from lora_edge.exporting.export import export
from lora_edge.parity import validate


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def test_figures_limits_and_controls(bundle: Path, base: Base) -> None:
    live = validate(bundle, base)
    replayed = validate(bundle)
    assert live.passed, live.table()
    assert replayed.passed, replayed.table()
    ran, again = ([case.name for case in x.cases if case.figures] for x in (live, replayed))
    assert ran == again
    for case in (*live.cases, *replayed.cases):
        if case.figures is None or case.limits is None:
            continue
        assert case.limits.logit <= 1e-4
        assert case.limits.effect <= 1e-4
        assert case.figures.top1 == 1.0
        if case.kind == "adapter" and ", long" not in case.name:
            assert case.controls is not None
            assert set(case.controls) > {"zeroed"}
            assert min(case.controls.values()) > 1000 * case.limits.effect
    assert "torch" in replayed.versions  # of the reference that recorded them


def test_the_bundle_carries_its_own_report(bundle: Path) -> None:
    (report,) = (bundle / "parity").glob("report-*.json")
    data = json.loads(report.read_text())
    assert data["passed"]
    assert data["bundle"] == "."
    assert str(bundle) not in report.read_text()


def test_nothing_is_written_when_nothing_is_new(bundle: Path, base: Base) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    assert validate(bundle, base).passed
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == before


def test_an_added_adapter_is_proved_and_recorded(
    bundle: Path, base: Base, adapters: dict[str, Path]
) -> None:
    add(bundle, {"varied": adapters["varied"]})
    unproved = validate(bundle)
    assert [case.adapters for case in unproved.failures] == [("varied",)]
    assert "--reference" in unproved.failures[0].reason
    assert validate(bundle, base).passed
    manifest = load_bundle(bundle).manifest
    assert manifest.adapters["varied"].proved
    on_disk = {f"parity/{path.name}" for path in (bundle / "parity").iterdir()}
    assert on_disk == {name for name in manifest.files if name.startswith("parity/")}
    replayed = validate(bundle)
    assert replayed.passed
    assert any("varied" in case.name for case in replayed.cases if "mixed" in case.name)


def test_an_interrupted_record_leaves_the_bundle_whole(
    bundle: Path, base: Base, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(bundle, {"varied": adapters["varied"]})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lora_edge.files.transaction.os.replace", full)
        with pytest.raises(BundleError, match="No space left"):
            validate(bundle, base)
    load_bundle(bundle).verify_all()
    assert not load_bundle(bundle).adapter("varied").proved
    assert validate(bundle, base).passed


def test_a_merged_bundle(base: Base, adapters: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "merged"
    export(base.directory, {"varied": adapters["varied"]}, "merged", output, form="portable")
    for report in (validate(output, base), validate(output)):
        assert report.passed
        ran = [case for case in report.cases if case.figures]
        assert [case.name.partition(", ")[2] for case in ran] == [
            "", "long prompt", "batch of 2", "batch of 16",
        ]  # fmt: skip
        assert {case.adapters for case in ran} == {("varied",)}


def test_one_adapter_alone_has_a_control_too(
    base: Base, adapters: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "one"
    export(base.directory, {"rooted": adapters["rooted"]}, output=output, form="portable")
    report = validate(output)
    controls = next(case.controls for case in report.cases if case.name == "adapter rooted")
    assert controls is not None
    assert set(controls) == {"zeroed", "given its inputs in reverse order"}


def test_another_base_and_another_adapter_are_refused(
    bundle: Path, base: Base, adapters: dict[str, Path], tmp_path: Path
) -> None:
    import safetensors.numpy as st

    other = Path(shutil.copytree(base.directory, tmp_path / "other"))
    weights = st.load_file(other / "model.safetensors")
    name = next(iter(weights))
    st.save_file({**weights, name: weights[name] * 1.5}, other / "model.safetensors")
    with pytest.raises(BundleError, match="fingerprint"):
        validate(bundle, other)
    with pytest.raises(AdapterError, match="not the adapter that was exported as rooted"):
        validate(bundle, base, adapters={"rooted": adapters["narrow"]})
    given = {"rooted": adapters["rooted"]}
    assert validate(bundle, base, adapters=given, steps=2).passed


def test_a_changed_golden_file_is_an_integrity_error(bundle: Path) -> None:
    golden = next((bundle / "parity").glob("adapter-*.npz"))
    golden.write_bytes(golden.read_bytes()[:-1])
    with pytest.raises(BundleError, match="differs from its hash"):
        validate(bundle)
