"""Removing adapters: they are gone with their golden cases, and nothing else is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import lora_edge
from lora_edge import AdapterNotFoundError, BundleError, OptionError
from lora_edge.parity.golden import recorded

MODELS = Path(__file__).parents[1] / "models"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("removal") / "bundle"
    given = {name: MODELS / "adapters" / name for name in ("echo", "mirror", "shout")}
    lora_edge.export(MODELS / "tiny-llama", given, output=output)
    return output


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def test_an_adapter_goes_with_all_cases_that_it_is_in(bundle: Path) -> None:
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    said: list[str] = []
    result = lora_edge.remove(bundle, ["mirror"], progress=said.append)
    assert set(result.manifest.adapters) == {"none", "echo", "shout"}
    after = lora_edge.load_bundle(bundle)
    after.verify_all()
    assert after.manifest == result.manifest
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert files == {*after.manifest.files, "lora_edge.json"}
    assert not (bundle / "adapters" / "mirror").exists()
    kinds = [golden.probe.kind for golden in recorded(after)]
    assert kinds == ["base", "adapter", "adapter"]  # the blend and the mixed batch had it
    assert said[0] == "golden cases that went along: adapter-mirror, blend, mixed"
    assert not [name for name in files if name.startswith("parity/report-")]
    same = {path for path in before if path.is_file() and path.name != "lora_edge.json"}
    assert all(path.read_bytes() == before[path] for path in same)
    assert lora_edge.validate(bundle, depth="quick").passed
    with pytest.raises(AdapterNotFoundError, match="'mirror'"):
        lora_edge.Runner(bundle).logits([[1, 2]], "mirror")


def test_cases_of_what_is_left_are_recorded_again_with_the_reference(bundle: Path) -> None:
    lora_edge.remove(bundle, ["mirror"])
    assert lora_edge.validate(bundle, MODELS / "tiny-llama", steps=1).passed
    after = lora_edge.load_bundle(bundle)
    after.verify_all()
    kinds = [golden.probe.kind for golden in recorded(after)]
    assert kinds == ["base", "adapter", "adapter", "blend", "mixed"]
    assert len([name for name in after.manifest.files if name.startswith("parity/report-")]) == 1


def test_all_of_them_and_one_again(bundle: Path) -> None:
    lora_edge.remove(bundle, ["echo", "mirror", "shout"])
    assert set(lora_edge.load_bundle(bundle).manifest.adapters) == {"none"}
    assert lora_edge.Runner(bundle).adapters == ()
    lora_edge.add(bundle, {"echo": MODELS / "adapters" / "shout"})
    entry = lora_edge.load_bundle(bundle).adapter("echo")
    assert not entry.proved


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        (["none"], OptionError, "'none' is the base without an adapter"),
        (["echo", "none"], OptionError, "'none' is the base"),
        (["nobody"], AdapterNotFoundError, "no adapter 'nobody'; it has echo, mirror, none, shout"),
        (["echo", "nobody"], AdapterNotFoundError, "'nobody'"),
        ([], OptionError, "expected one or several names"),
        ("echo", OptionError, "expected one or several names"),
    ],
)
def test_what_cannot_be_removed_is_refused_and_nothing_goes(
    names: list[str], error: type[Exception], words: str, bundle: Path
) -> None:
    before = (bundle / "lora_edge.json").read_bytes()
    with pytest.raises(error, match=words) as refused:
        lora_edge.remove(bundle, names)
    assert refused.value.hint  # type: ignore[attr-defined]
    assert (bundle / "lora_edge.json").read_bytes() == before
    lora_edge.load_bundle(bundle).verify_all()


def test_the_adapter_of_a_merged_bundle_stays(bundle: Path) -> None:
    file = bundle / "lora_edge.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | {"mode": "merged"}))
    with pytest.raises(BundleError, match="is a merged bundle: its adapter is in the weights"):
        lora_edge.remove(bundle, ["echo"])
