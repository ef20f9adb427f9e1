"""Providers and levels, depths, and validations that were cut off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_edge.base.checkpoint import Base
from lora_edge.errors import DataError, OptionError, ProviderError
from lora_edge.exporting.export import export
from lora_edge.parity import Report, validate
from lora_edge.parity.checks import compare
from tests.support.examples import examples

LEVELS = ["all", "extended", "basic", "disable"]


@pytest.fixture(scope="module")
def bundle(base: Base, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sessions") / "out"
    export(base.directory, adapters, output=output, form="portable")
    return output


def _data(report: Report) -> dict[str, Any]:
    data = report.to_data()
    del data["seconds"], data["summary"]  # the summary ends with the seconds
    return data


@pytest.mark.parametrize("source", examples(["goldens", "reference"], ["goldens"]))
def test_the_same_twice(bundle: Path, base: Base, source: str) -> None:
    reference = base if source == "reference" else None
    first, second = (validate(bundle, reference, steps=4) for _ in range(2))
    assert _data(first) == _data(second)


def test_full_runs_every_level_and_every_pair(bundle: Path, base: Base) -> None:
    for reference in (None, base):
        report = validate(bundle, reference, depth="full", steps=4)
        assert report.passed, report.table()
        assert [session.optimization for session in report.sessions] == LEVELS
        by_session = {name: [] for name in (session.name for session in report.sessions)}
        # What lies around the graph is no affair of the sessions.
        for case in (x for x in report.cases if x.kind not in {"around", "weights"}):
            by_session[case.session].append((case.name, case.kind))
        first, *others = by_session.values()
        assert all(names == first for names in others)
        pairs = {name for name, kind in first if kind == "switch"}
        assert len(pairs) == 4 * 3  # base and three adapters, each with each other
        placed = [session.placement for session in report.sessions]
        assert all(nodes and set(nodes) == {"CPUExecutionProvider"} for nodes in placed)
        # Without optimization the graph runs as it was written, with it fused further or less.
        assert placed[0] != placed[-1]


def test_quick_is_shorter(bundle: Path) -> None:
    quick, normal = validate(bundle, depth="quick"), validate(bundle)
    assert quick.passed
    wholes = {case.name: case for case in normal.cases}
    assert {case.name for case in quick.cases} < set(wholes)
    for short in quick.cases:
        whole = wholes[short.name]
        if short.figures and whole.figures:
            assert short.figures.positions < whole.figures.positions


def test_a_session_that_cannot_be(bundle: Path) -> None:
    with pytest.raises(DataError, match="'most'"):
        validate(bundle, optimization="most")
    with pytest.raises(DataError, match="no session"):
        validate(bundle, provider=[])
    with pytest.raises(ProviderError):
        validate(bundle, provider=["cpu", "nowhere"])


@pytest.mark.parametrize("source", examples(["goldens", "reference"], ["goldens"]))
def test_one_that_was_cut_off_goes_on(
    bundle: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    reference = base if source == "reference" else None
    options: dict[str, Any] = {"steps": 4, "optimization": ["all", "disable"]}
    whole = validate(bundle, reference, **options)
    compared: list[str] = []

    def counted(runner: Any, golden: Any, tolerance: Any, broken: Any, limit: int) -> Any:
        if len(compared) == limit:
            raise KeyboardInterrupt
        compared.append(golden.probe.name)
        return compare(runner, golden, tolerance, broken)

    folder = tmp_path / "finished"
    # Cut off in the first session, then in the second, then not any more.
    for limit in (3, 16, 99):
        with monkeypatch.context() as patch:
            patch.setattr(
                "lora_edge.parity.in_session.compare",
                lambda *given, limit=limit: counted(*given, limit),
            )
            if limit < 99:
                with pytest.raises(KeyboardInterrupt):
                    validate(bundle, reference, resume=folder, **options)
                assert folder.is_dir()
            else:
                lines: list[str] = []
                resumed = validate(
                    bundle, reference, resume=folder, progress=lines.append, **options
                )
    assert len(compared) == 2 * 12  # every probe once in each session
    assert not [line for line in lines if "in PyTorch" in line]
    assert _data(resumed) == _data(whole)
    assert not folder.exists()


def test_what_was_finished_of_something_else_is_not_used(bundle: Path, tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if "blend" in line:
            raise KeyboardInterrupt

    folder = tmp_path / "finished"
    with pytest.raises(KeyboardInterrupt):
        validate(bundle, resume=folder, progress=stop)
    lines: list[str] = []
    assert validate(bundle, steps=3, resume=folder, progress=lines.append).passed
    assert sum(line.startswith("comparing") and "around" not in line for line in lines) == 12
    # A line that was being written when it was cut off is done again.
    with pytest.raises(KeyboardInterrupt):
        validate(bundle, resume=folder, progress=stop)
    parts = folder / "finished.jsonl"
    parts.write_text(parts.read_text()[:-40])
    lines.clear()
    assert validate(bundle, resume=folder, progress=lines.append).passed
    assert sum(line.startswith("comparing") and "around" not in line for line in lines) == 5
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(DataError, match="holds no validation"):
        validate(bundle, resume=tmp_path / "other")
    assert (tmp_path / "other" / "letter.txt").read_text() == "mine"


def test_every_adapter_is_in_a_mixed_batch(
    adapters: dict[str, Path], base: Base, tmp_path: Path
) -> None:
    many = {f"{name}{index}": path for index in range(3) for name, path in adapters.items()}
    output = tmp_path / "many"
    export(base.directory, many, output=output, form="portable")
    report = validate(output)
    assert report.passed, report.table()
    mixed = {case.adapters for case in report.cases if case.kind == "mixed"}
    assert {(name,) for name in many} <= mixed
    assert sum(path.stat().st_size for path in (output / "parity").iterdir()) <= 1_000_000


def test_the_report_says_what_ran_on_what(bundle: Path, base: Base) -> None:
    data = json.loads(validate(bundle, base, steps=2, seed=3).to_json())
    assert data["settings"] == {
        "depth": "normal",
        "steps": 2,
        "seed": 3,
        "prompts": 0,
        "multiple": 10.0,
        "sensitivity": 0.01,
    }
    assert set(data["machine"]) == {"system", "machine", "processor", "cores", "python"}
    assert all(data["machine"].values())
    assert {"torch", "peft", "transformers", "onnxruntime"} <= set(data["versions"])
    assert data["command"].startswith(f"lora-edge validate {bundle} --reference ")
    assert "--steps 2 --seed 3" in data["command"]
    assert {case["kind"] for case in data["cases"]} - {"around", "weights"} == {
        "base",
        "adapter",
        "blend",
        "mixed",
        "switch",
    }


def test_what_is_not_its_own_stays(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("validation.json", "lora-edge-validation.json"):
        (folder / name).write_text('{"key": "mine"}')
        (folder / "data.csv").write_text("mine")
        if name == "validation.json":
            with pytest.raises(DataError, match="holds no validation"):
                validate(bundle, resume=folder)
        else:
            assert validate(bundle, steps=1, resume=folder).passed
        assert (folder / "data.csv").read_text() == "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["data.csv", "validation.json"]


def test_another_first_session_is_compared_with_whole_logits(
    bundle: Path, base: Base, tmp_path: Path
) -> None:
    def stop(line: str) -> None:
        if "blend" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        validate(bundle, base, steps=2, resume=tmp_path / "finished", progress=stop)
    options: dict[str, Any] = {"steps": 2, "optimization": "basic"}
    resumed = validate(bundle, base, resume=tmp_path / "finished", **options)
    assert _data(resumed) == _data(validate(bundle, base, **options))


def test_arguments_that_cannot_be_meant(bundle: Path) -> None:
    for options in ({"depth": "fulll"}, {"steps": 0}, {"seed": -1}):
        with pytest.raises((DataError, OptionError)):
            validate(bundle, **options)  # type: ignore[arg-type]
    report = validate(bundle, provider=["cpu", "CPUExecutionProvider"], steps=1)
    assert len(report.sessions) == 1
