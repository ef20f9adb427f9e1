"""Removing adapters: they are gone with their golden cases, and nothing else is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import lora_edge
from lora_edge import AdapterNotFoundError, BundleError, OptionError
from lora_edge.parity.record.golden import recorded


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def test_an_adapter_goes_with_all_cases_that_it_is_in(copy: Path) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    held = recorded(lora_edge.load_bundle(copy))
    gone = sorted(golden.stem for golden in held if "mirror" in golden.probe.adapters)
    assert {"adapter-mirror", "blend", "mixed"} <= set(gone) < {golden.stem for golden in held}
    said: list[str] = []
    result = lora_edge.remove(copy, ["mirror"], progress=said.append)
    assert set(result.manifest.adapters) == {"none", "echo", "shout"}
    after = lora_edge.load_bundle(copy)
    after.verify_all()
    assert after.manifest == result.manifest
    files = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert files == {*after.manifest.files, "lora_edge.json"}
    assert not (copy / "adapters" / "mirror").exists()
    left = {golden.stem for golden in recorded(after)}
    assert left == {golden.stem for golden in held} - set(gone)
    assert said[0] == f"golden cases that went along: {', '.join(gone)}"
    assert not [name for name in files if name.startswith("parity/report-")]
    same = {path for path in before if path.is_file() and path.name != "lora_edge.json"}
    assert all(path.read_bytes() == before[path] for path in same)
    assert lora_edge.validate(copy, depth="quick").passed
    with pytest.raises(AdapterNotFoundError, match="'mirror'"):
        lora_edge.Runner(copy).generate(["x"], adapter="mirror", max_new_tokens=1)


def test_cases_of_what_is_left_are_recorded_again_with_the_reference(
    copy: Path, base: Path
) -> None:
    lora_edge.remove(copy, ["mirror"])
    assert lora_edge.validate(copy, base, steps=1).passed
    after = lora_edge.load_bundle(copy)
    after.verify_all()
    assert {golden.probe.kind for golden in recorded(after)} >= {"adapter", "blend", "mixed"}
    assert len([name for name in after.manifest.files if name.startswith("parity/report-")]) == 1


def test_all_of_them_and_one_again(copy: Path, adapters: dict[str, Path]) -> None:
    lora_edge.remove(copy, ["echo", "mirror", "shout"])
    assert set(lora_edge.load_bundle(copy).manifest.adapters) == {"none"}
    assert lora_edge.Runner(copy).adapters == ()
    lora_edge.add(copy, {"echo": adapters["shout"]})
    entry = lora_edge.load_bundle(copy).adapter("echo")
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
    names: list[str], error: type[Exception], words: str, copy: Path
) -> None:
    before = (copy / "lora_edge.json").read_bytes()
    with pytest.raises(error, match=words) as refused:
        lora_edge.remove(copy, names)
    assert refused.value.hint  # type: ignore[attr-defined]
    assert (copy / "lora_edge.json").read_bytes() == before
    lora_edge.load_bundle(copy).verify_all()


def test_the_adapter_of_a_merged_bundle_stays(copy: Path) -> None:
    file = copy / "lora_edge.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | {"mode": "merged"}))
    with pytest.raises(BundleError, match="is a merged bundle: its adapter is in the weights"):
        lora_edge.remove(copy, ["echo"])
