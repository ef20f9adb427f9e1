"""Every fault is found from PyTorch and from the goldens, and explained; what is whole passes."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lora_edge
from lora_edge.bundle.bundle import load_bundle
from lora_edge.cli import main
from lora_edge.parity.compare import Verdict
from tests.faults import injections
from tests.faults.fault_table import DAMAGES, FAULTS, SOURCES, STEPS, Damage, Fault, Source, outcome
from tests.faults.worlds import HEALTHY, Worlds
from tests.support.failing import signed

# ci/faults goes through all of them; here a fused and a portable one, and the worlds of the faults.
_PASSING = [x for x in HEALTHY if not x.startswith("random")] + [
    "random gemma2", "random gpt_neox"
]  # fmt: skip


def _trials() -> Iterator[Any]:
    """Of the faults of one place in one world every second one, one in four against PyTorch.

    The others, and all of them from the other source, are for ci/long and ci/faults.
    """
    seen: Counter[tuple[str, str]] = Counter()
    now = 0
    for fault in FAULTS:
        alike = fault.how, fault.world
        chosen = SOURCES[0 if now % 4 == 0 else 1] if seen[alike] % 2 == 0 else None
        now += chosen is not None
        seen[alike] += 1
        for source in SOURCES:
            yield pytest.param(
                *(fault, source),
                id=f"{fault.name}-{source}",
                marks=() if source == chosen else pytest.mark.long,
            )


def test_there_are_many_unlike_faults() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 60
    assert {fault.how for fault in FAULTS} == {
        "adapter file", "graph", "runtime", "merged", "adapter", "manifest", "around", "weights",
    }  # fmt: skip


@pytest.mark.parametrize(("fault", "source"), [*_trials()])
def test_a_fault_is_found_and_explained(
    fault: Fault, source: Source, worlds: Worlds, tmp_path: Path
) -> None:
    found = outcome(fault, worlds, source, tmp_path)
    assert found.caught
    assert found.explained, found.reason
    assert found.spared


@pytest.mark.parametrize("name", _PASSING)
def test_what_is_whole_passes(name: str, worlds: Worlds, tmp_path: Path) -> None:
    base, bundle = worlds.copy(name, tmp_path / "bundle")
    for report in (lora_edge.validate(bundle), lora_edge.validate(bundle, base, steps=STEPS)):
        assert report.passed, report.table()
        ran = [case for case in report.cases if case.kind not in {"around", "weights"}]
        # A merged bundle is its adapter alone; one without adapters is its base.
        assert len(ran) >= (13 if len(report.adapters) > 1 and report.mode != "merged" else 1)


def test_a_judge_that_sees_nothing_kills_nothing(
    worlds: Worlds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The suite itself can fail: where every comparison passes, its controls tell."""
    worlds.world(FAULTS[0].world)  # exported while the judge sees

    def blind(*_: object, **__: object) -> Verdict:
        return Verdict("passed")

    monkeypatch.setattr("lora_edge.parity.checks.judge", blind)
    found = outcome(FAULTS[0], worlds, "goldens", tmp_path)
    assert not found.caught
    assert not found.killed


@pytest.mark.parametrize("damage", DAMAGES, ids=[damage.name for damage in DAMAGES])
def test_a_damaged_bundle_is_refused(damage: Damage, worlds: Worlds, tmp_path: Path) -> None:
    _, bundle = worlds.copy("portable", tmp_path / "bundle")
    damage.inject(bundle)
    with pytest.raises(lora_edge.LoraEdgeError, match=damage.words):
        lora_edge.validate(bundle)


def test_the_command_says_what_is_wrong_and_exits_with_1_or_2(
    worlds: Worlds,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # a reproduction is left there
    _, bundle = worlds.copy("portable", tmp_path / "bundle")
    injections.of_file("plain", injections.times(2))(bundle)
    with pytest.raises(SystemExit) as stopped:
        main(["validate", str(bundle)])
    assert stopped.value.code == 2
    assert "adapters/plain/adapter.onnx_adapter differs" in capsys.readouterr().err
    signed(bundle)
    with pytest.raises(SystemExit) as stopped:
        main(["validate", str(bundle)])
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert "failed: adapter plain" in said
    assert "plain is scaled by 2" in said


def test_a_failure_withdraws_the_proof_until_it_passes_again(
    worlds: Worlds, tmp_path: Path
) -> None:
    base, directory = worlds.copy("portable", tmp_path / "bundle")
    injections.of_file("rooted", injections.times(2))(directory)
    signed(directory)
    assert load_bundle(directory).adapter("rooted").proved
    assert not lora_edge.validate(directory, base, steps=STEPS).passed
    withdrawn = load_bundle(directory)
    proved = {name: entry.proved for name, entry in withdrawn.manifest.adapters.items()}
    # The blend of plain and rooted failed too, and that is rooted's fault alone.
    assert proved == {"none": True, "plain": True, "rooted": False, "varied": True}
    withdrawn.verify_all()
    # With the right file again, the goldens agree, but PyTorch has not seen it since.
    whole = worlds.world("portable").bundle
    file = withdrawn.adapter("rooted").file
    shutil.copyfile(whole / file, directory / file)
    signed(directory)
    report = lora_edge.validate(directory)
    assert [case.adapters for case in report.failures] == [("rooted",)]
    assert report.failures[0].status == "unproved"
    assert "did not pass" in report.failures[0].reason
    assert lora_edge.validate(directory, base, steps=STEPS).passed
    assert load_bundle(directory).adapter("rooted").proved
    assert lora_edge.validate(directory).passed


def test_the_proof_of_an_adapter_without_effect_is_not_recorded(
    worlds: Worlds, tmp_path: Path
) -> None:
    base, bundle = worlds.copy("portable", tmp_path / "bundle")
    injections.dead("rooted", 0.0)(bundle)
    assert not lora_edge.validate(bundle, base, steps=STEPS).passed
    assert not load_bundle(bundle).adapter("dead").proved
    report = lora_edge.validate(bundle)
    assert [case.adapters for case in report.failures] == [("dead",)]


@pytest.mark.parametrize("source", SOURCES)
def test_a_merged_bundle_has_controls(
    source: Source, worlds: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, bundle = worlds.world("merged")
    reference = base if source == "reference" else None
    case = next(x for x in lora_edge.validate(bundle, reference).cases if x.figures)
    assert case.status == "passed"
    assert case.controls is not None
    assert case.controls == pytest.approx({"absent": 1, "expected to do the opposite": 2}, rel=1e-3)

    def blind(*_: object, **__: object) -> Verdict:
        return Verdict("passed")

    monkeypatch.setattr("lora_edge.parity.checks.judge", blind)
    case = next(x for x in lora_edge.validate(bundle).cases if x.figures)
    assert case.status == "unproved"
    assert "absent or expected to do the opposite" in case.reason


def test_the_golden_verdict_does_not_change_the_manifest(worlds: Worlds, tmp_path: Path) -> None:
    """PyTorch alone gives and takes the proof."""
    _, bundle = worlds.copy("merged", tmp_path / "bundle")
    injections.merged(lambda base, change: base + 2 * change)(bundle)
    signed(bundle)
    before = (bundle / "lora_edge.json").read_bytes()
    assert not lora_edge.validate(bundle).passed
    assert (bundle / "lora_edge.json").read_bytes() == before
    assert json.loads(before)["adapters"]["small"]["proved"]
