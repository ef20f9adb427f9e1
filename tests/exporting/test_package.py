"""Model packages of ONNX Runtime: what they hold, opened by ONNX Runtime itself; changed bytes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import lora_edge
from lora_edge.bundle.bundle import load_bundle
from lora_edge.bundle.package import Package, directory_uri, load_package
from lora_edge.exporting.package import write_package
from lora_edge.parity.record.golden import recorded
from tests.support.commands import exit_code
from tests.support.failing import signed
from tests.support.modules import load_file
from tests.support.paths import ROOT
from tests.support.shipped import export_heads

NAMES = {"none", "plain", "rooted", "varied"}
example = load_file("example_model_package", ROOT / "examples" / "model_package.py")
has_packages = pytest.mark.skipif(
    not hasattr(ort, "ModelPackage"), reason="this onnxruntime has no model packages"
)


class Made:
    """A bundle for each of two providers, and their package."""

    def __init__(self, fused: Path, portable: Path, directory: Path) -> None:
        self.bundles = {"cpu": fused, "openvino": portable}
        self.directory = directory
        self.package = write_package(self.bundles, directory, link=True)


@pytest.fixture(scope="module")
def made(
    base: Path, adapters: dict[str, Path], exported: Path, tmp_path_factory: pytest.TempPathFactory
) -> Made:
    root = tmp_path_factory.mktemp("package")
    lora_edge.export(base, adapters, output=root / "portable", form="portable")
    return Made(exported, root / "portable", root / "package")


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Package:
    """One that may be changed."""
    return load_package(shutil.copytree(made.directory, tmp_path / "copy"))


def test_adapters_and_weights_are_there_once(made: Made) -> None:
    first, second = (made.package.variants[name].info.assets for name in ("cpu", "openvino"))
    assert first.keys() == second.keys()
    assert {f"adapters/{name}" for name in NAMES} == first.keys() - {"onnx", "."}
    assert first == second
    assert len(list(made.directory.rglob("adapter.onnx_adapter"))) == len(NAMES)
    (weights,) = made.directory.rglob("model.onnx_data")
    # The portable graph's are the beginning of the fused one's.
    sizes = [
        bundle.joinpath("onnx/model.onnx_data").stat().st_size for bundle in made.bundles.values()
    ]
    assert sizes[0] > sizes[1]
    assert weights.stat().st_size == sizes[0]


@has_packages
def test_onnxruntime_knows_the_hashes_and_the_format(made: Made) -> None:
    package = ort.ModelPackage.open(str(made.directory))
    assets = {x["uri"]: Path(x["resolved_path"]) for x in package.get_info()["shared_assets"]}
    own = {uri for x in made.package.variants.values() for uri in x.info.assets.values()}
    assert own == set(assets)
    for uri, folder in assets.items():
        assert directory_uri(folder) == uri == ort.ModelPackage.compute_directory_hash(str(folder))
    context = ort.ModelPackageContext(str(made.directory))
    assert context.get_component_names() == ["decoder"]
    assert context.get_variant_ep_name("decoder", "openvino") == "OpenVINOExecutionProvider"


@has_packages
def test_golden_cases_in_plain_onnxruntime(made: Made) -> None:
    """With each adapter: the bundle's numbers to the bit, and PyTorch's."""
    runner = lora_edge.Runner(made.bundles["cpu"], session_cache=False, native=False)
    seen = []
    for golden in recorded(runner.bundle):
        probe = golden.probe
        if probe.kind not in ("adapter", "base") or (len(probe.rows) != 1 and probe.part):
            continue
        row, expected = list(probe.rows[0]), golden.expected[0]
        name = probe.adapters[0] if probe.adapters else "none"
        found = example.logits(made.directory, name, row)
        np.testing.assert_allclose(found, runner.logits([row], adapter=name)[0], atol=1e-6)
        expected = expected.first(len(row))
        places = slice(None) if expected.places is None else expected.places
        assert expected.columns is not None
        kept = np.take_along_axis(found[places], expected.columns, axis=1)
        np.testing.assert_allclose(kept, expected.reference, atol=1e-4)
        if expected.base is not None:
            assert np.abs(kept - expected.base).max() > 0.01
        seen.append(name)
    assert set(seen) == NAMES


def test_a_variant_is_the_bundle_again(made: Made, tmp_path: Path) -> None:
    bundle = made.package.variants["openvino"].unpack(tmp_path / "out")
    bundle.verify_all()
    assert lora_edge.validate(bundle, depth="quick").passed
    theirs = {x.relative_to(made.bundles["openvino"]) for x in made.bundles["openvino"].rglob("*")}
    assert {x.relative_to(tmp_path / "out") for x in (tmp_path / "out").rglob("*")} <= theirs


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("onnx", "model.onnx_data"),
        ("adapters/plain", "adapter.onnx_adapter"),
        (".", "generation_config.json"),
    ],
)
def test_a_changed_byte_of_an_asset_is_found(folder: str, file: str, copy: Package) -> None:
    copy.check()
    path = copy.variants["cpu"].place_of(file if folder == "." else f"{folder}/{file}")
    assert "shared_assets" in path.parts
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(lora_edge.BundleError, match=f"{file} differs from its hash"):
        copy.check()


def _edited(package: Package, change: Any) -> Path:
    path = package.directory / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data["components"]["decoder"]["variants"])
    path.write_text(json.dumps(data), encoding="utf-8")
    return package.directory


def test_other_changes_are_found(copy: Package) -> None:
    added = copy.variants["cpu"].place_of("adapters/plain/adapter.onnx_adapter").parent / "more"
    added.write_text("x", encoding="utf-8")
    with pytest.raises(lora_edge.BundleError, match="a file was changed, added or renamed"):
        copy.check()
    added.unlink()
    added.symlink_to(copy.directory / "manifest.json")
    with pytest.raises(lora_edge.BundleError, match="is a link"):
        copy.check()
    added.unlink()
    graph = copy.variants["cpu"].folder / "onnx" / "model.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[:-1])
    with pytest.raises(lora_edge.BundleError, match=r"model\.onnx differs"):
        copy.check()
    graph.unlink()
    with pytest.raises(lora_edge.BundleError, match=r"model\.onnx is missing \(cpu\)"):
        copy.check()
    graph.write_bytes(whole)
    copy.check()
    manifest = copy.variants["cpu"].folder / "lora_edge.json"
    manifest.write_text(manifest.read_text(encoding="utf-8") + " ", encoding="utf-8")
    with pytest.raises(lora_edge.BundleError, match=r"lora_edge\.json differs from its hash"):
        copy.check()


def test_a_package_is_no_bundle(made: Made) -> None:
    with pytest.raises(lora_edge.BundleError, match="is a model package") as caught:
        lora_edge.Runner(made.directory)
    assert "package --check" in caught.value.hint


def test_manifests_that_are_none(copy: Package, tmp_path: Path) -> None:
    with pytest.raises(lora_edge.BundleError, match="is no model package"):
        load_package(tmp_path)
    path = copy.directory / "manifest.json"
    whole = path.read_text(encoding="utf-8")
    for change, message in (
        (lambda x: x["cpu"].pop("executor_info"), "'cpu' is none of lora-edge's"),
        (lambda x: x.update({"../x": x["cpu"]}), "a variant is '../x'"),
        (lambda x: x["cpu"]["executor_info"]["lora_edge"]["assets"].update(a="b"), "sha256: and"),
        (lambda x: x.clear(), "has no variants"),
    ):
        path.write_text(whole, encoding="utf-8")
        with pytest.raises(lora_edge.BundleError, match=message):
            load_package(_edited(copy, change))
    path.write_text(whole, encoding="utf-8")
    session = {"model_file": "onnx/base.onnx", "session_options": {}}
    for change in (
        lambda x: x["cpu"]["executor_info"].update(ort=session),
        lambda x: x["cpu"].update(ep="OpenVINOExecutionProvider"),
        lambda x: x["cpu"].update(variant_directory="openvino"),
        lambda x: x["cpu"]["executor_info"]["lora_edge"]["adapters"].popitem(),
    ):
        path.write_text(whole, encoding="utf-8")
        changed = load_package(_edited(copy, change))
        with pytest.raises(lora_edge.BundleError, match=r"of decoder, cpu is not what"):
            changed.check()
    path.write_text('{"components": {"a": "folder"}}', encoding="utf-8")
    with pytest.raises(lora_edge.BundleError, match="a component has no variants in it"):
        load_package(copy.directory)


def test_at_the_command_line(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "package"
    bundle = str(made.bundles["cpu"])
    assert exit_code(["package", bundle, "-o", str(target), "--link"]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert exit_code(["package", "--check", str(target)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("cpu:\n")
    assert "\npassed: " in said
    assert exit_code(["package", bundle, "-o", str(target)]) == 2
    assert "is not empty" in capsys.readouterr().err
    for arguments, message in (
        (["package", f"npu={bundle}", "-o", str(tmp_path / "x")], "no execution provider 'npu'"),
        (["package", bundle, f"cpu={bundle}", "-o", str(tmp_path / "x")], "two bundles"),
        (["package", bundle], "give a bundle and -o DIR"),
        (["package", bundle, "--check", str(target)], "--check takes a package"),
    ):
        assert exit_code(arguments) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
    (target / "cpu" / "config.json").unlink()
    assert exit_code(["package", "--check", str(target)]) == 2
    assert "config.json is missing" in capsys.readouterr().err


def test_the_check_replays_golden_cases(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an adapter that has another's tensors, with hashes that are right."""
    adapters = bundle / "adapters"
    shutil.copy(adapters / "rooted" / "adapter.onnx_adapter", adapters / "plain")
    signed(bundle)
    target = str(tmp_path / "package")
    assert exit_code(["package", str(bundle), "-o", target]) == 0
    load_package(target).check()
    assert exit_code(["package", "--check", target]) == 1
    assert "adapter plain" in capsys.readouterr().out


def test_unlike_bundles_are_refused(made: Made, bundle: Path, tmp_path: Path) -> None:
    opened = load_bundle(bundle)
    other = {**opened.manifest.base, "fingerprint": "0" * 64}
    opened.write_manifest(dataclasses.replace(opened.manifest, base=other))
    with pytest.raises(lora_edge.OptionError, match="cpu and openvino are of unlike bases"):
        write_package({"cpu": made.bundles["cpu"], "openvino": bundle}, tmp_path / "out")
    with pytest.raises(lora_edge.OptionError, match="no bundle was given"):
        write_package({}, tmp_path / "out")
    with (bundle / "onnx" / "model.onnx").open("ab") as graph:
        graph.write(b"x")
    with pytest.raises(lora_edge.BundleError, match=r"model\.onnx differs from its hash"):
        write_package({"cpu": bundle}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@has_packages
@pytest.mark.long
def test_classifiers(tmp_path: Path) -> None:
    bundle = export_heads(tmp_path / "bundle")
    package = write_package({"cpu": bundle}, tmp_path / "package")
    assert sorted(package.variants["cpu"].info.adapters) == ["claims", "letters", "none"]
    context = ort.ModelPackageContext(str(tmp_path / "package"))
    options = ort.ModelPackageOptions(ort.SessionOptions())
    session = context.select_component("encoder", options).create_session()
    adapter = ort.LoraAdapter()
    uri = package.variants["cpu"].info.adapters["letters"]
    adapter.Load(context.resolve_string_ref(uri, must_exist=True))
    run = ort.RunOptions()
    run.add_active_adapter(adapter)
    ids = np.array([[2, 9, 13, 3]])
    given = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
    (found,) = session._sess.run(["logits"], given, run)
    own = lora_edge.Runner(bundle).logits(ids, adapter="letters")
    np.testing.assert_allclose(found, own, atol=1e-6)
