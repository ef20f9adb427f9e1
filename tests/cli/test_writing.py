"""What commands leave on the disk: beside others, after a kill, when nobody reads along."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lora_edge
from lora_edge import BundleError, ParityError
from lora_edge.parity import engine
from lora_edge.parity.record.golden import recorded
from tests.support.commands import Cli


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture
def others(adapters: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Adapters that the bundle does not hold: the shipped ones with another scale."""
    made = {}
    for number, (name, path) in enumerate(adapters.items(), 1):
        made[name] = Path(shutil.copytree(path, tmp_path / "others" / name))
        file = made[name] / "adapter_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] + number}))
    return made


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _whole(bundle: Path) -> set[str]:
    """The adapters of a bundle in which everything is in its place, and nothing else is."""
    found = lora_edge.load_bundle(bundle)
    found.verify_all()
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert files == {*found.manifest.files, "lora_edge.json"}
    assert _names(bundle / "adapters") == set(found.manifest.adapters)
    return set(found.manifest.adapters) - {"none"}


def _killed(work: Callable[[], Any]) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode


# --- two at once (C1, C2) ------------------------------------------------------------------------


def test_a_folder_that_appears_while_an_export_runs_is_left(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"

    def make(line: str) -> None:
        if line.startswith("validating"):
            output.mkdir()
            (output / "mine.txt").write_text("mine")

    with pytest.raises(BundleError, match="out appeared while this was made") as error:
        lora_edge.export(base, {}, output=output, progress=make)
    assert "--force" in error.value.hint
    assert (output / "mine.txt").read_text() == "mine"
    assert _names(tmp_path) == {"out"}


def _before_the_write(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """The change is made once, when an adapter is about to be written."""
    from lora_edge.exporting import add as adding

    write = adding.write_adapter_folder

    def change_and_write(*arguments: Any, **named: Any) -> Any:
        monkeypatch.setattr(adding, "write_adapter_folder", write)
        change()
        return write(*arguments, **named)

    monkeypatch.setattr(adding, "write_adapter_folder", change_and_write)


def test_two_adds_at_once_keep_both(
    copy: Path, others: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _before_the_write(monkeypatch, lambda: lora_edge.add(copy, {"second": others["echo"]}))
    result = lora_edge.add(copy, {"first": others["shout"]})
    assert set(result.manifest.adapters) >= {"first", "second"}
    assert _whole(copy) == {"echo", "mirror", "shout", "first", "second"}


def test_of_two_adds_of_one_name_the_second_is_refused_and_the_first_stays(
    copy: Path, others: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _before_the_write(monkeypatch, lambda: lora_edge.add(copy, {"new": others["echo"]}))
    with pytest.raises(lora_edge.AdapterError, match="already has an adapter 'new', from other"):
        lora_edge.add(copy, {"new": others["shout"]})
    assert _whole(copy) == {"echo", "mirror", "shout", "new"}
    assert lora_edge.add(copy, {"new": others["echo"]}).manifest.adapters["new"].name == "new"


def test_what_is_added_and_removed_during_a_validation_stays_so(
    copy: Path, base: Path, others: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation records what it saw, and neither loses the one nor revives the other."""
    lora_edge.add(copy, {"proved": others["mirror"]})
    said: list[str] = []
    record = engine.record

    def change_and_record(*arguments: Any) -> None:
        lora_edge.add(copy, {"late": others["echo"]})
        lora_edge.remove(copy, ["shout"])
        record(*arguments)

    monkeypatch.setattr(engine, "record", change_and_record)
    report = lora_edge.validate(copy, base, steps=1, progress=said.append)
    assert report.passed, report.table()
    assert _whole(copy) == {"echo", "mirror", "proved", "late"}
    entries = lora_edge.load_bundle(copy).manifest.adapters
    assert {name for name, entry in entries.items() if not entry.proved} == {"late"}
    assert "shout was removed or replaced meanwhile: nothing is recorded of it" in said
    used = {
        name for golden in recorded(lora_edge.load_bundle(copy)) for name in golden.probe.adapters
    }
    assert "shout" not in used
    assert "proved" in used


def test_a_bundle_that_is_replaced_during_an_add_is_left(
    copy: Path, others: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace_it() -> None:
        old = copy.rename(copy.with_name("old"))
        shutil.copytree(old, copy, ignore=shutil.ignore_patterns(".*"))
        data = json.loads((copy / "lora_edge.json").read_text())
        data["base"]["name_or_path"] = "another/base"
        (copy / "lora_edge.json").write_text(json.dumps(data))

    _before_the_write(monkeypatch, replace_it)
    with pytest.raises(BundleError, match="was replaced by another bundle meanwhile"):
        lora_edge.add(copy, {"new": others["shout"]})
    assert _whole(copy) == {"echo", "mirror", "shout"}


# --- kill -9 (C3) --------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("one",), ("one", "two")])
def test_after_a_kill_in_add_the_same_command_succeeds(
    names: tuple[str, ...], copy: Path, others: dict[str, Path]
) -> None:
    given = {name: others[x] for name, x in zip(names, ("shout", "echo"), strict=False)}

    def add_and_die() -> None:
        def die(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        os.replace = die  # of the manifest: all the rest is written
        lora_edge.add(copy, given)

    assert _killed(add_and_die) == -signal.SIGKILL
    assert all((copy / "adapters" / name / "peft").is_dir() for name in names)
    lora_edge.load_bundle(copy).verify_all()
    lora_edge.add(copy, given)
    assert _whole(copy) == {"echo", "mirror", "shout", *names}
    lora_edge.add(copy, given)  # done already, from the same files
    assert _whole(copy) == {"echo", "mirror", "shout", *names}


def test_what_is_in_the_way_of_an_adapter_is_left(copy: Path, others: dict[str, Path]) -> None:
    mine = copy / "adapters" / "new" / "peft" / "adapter_config.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(BundleError, match=r"adapter_config\.json exists and does not belong to"):
        lora_edge.add(copy, {"new": others["shout"]})
    assert mine.read_text() == "mine"
    assert [path for path in (copy / "adapters" / "new").rglob("*") if path.is_file()] == [mine]


# --- where the output is (C5) --------------------------------------------------------------------


def test_an_export_into_the_folder_that_one_is_in(
    cli: Cli, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli("export", base, "-o", ".").code == 0
    assert _whole(tmp_path / "here") == set()
    result = cli("export", base, "-o", ".", "--force")
    assert result.code == 2
    assert "the folder that this command was called in" in result.err
    assert "capturing" not in result.err
    assert _whole(tmp_path / "here") == set()
    assert _names(tmp_path) == {"here"}


def test_train_with_export_sees_first_that_it_cannot_export(
    cli: Cli, base: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "file").write_text("mine")
    for output, bundle, words in (
        ("out", "file", "is no folder"),
        ("con", "bundle", "a device on Windows"),
    ):
        result = cli("train", base, data, "-o", tmp_path / output, "--export", tmp_path / bundle)
        assert (result.code, result.out) == (2, "")
        assert words in result.err
        assert _names(tmp_path) == {"data.jsonl", "file"}


# --- nothing half-written ------------------------------------------------------------------------


def test_an_export_that_is_not_proved_leaves_nothing(
    base: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_edge.exporting import export as exporter

    def fail(staged: Any, *_: Any, **__: Any) -> None:
        assert _names(staged.directory) > {"onnx", "lora_edge.json"}
        raise ParityError("it differs", "Nothing was published.")

    monkeypatch.setattr(exporter, "_prove", fail)
    for output in (tmp_path / "deep" / "out", tmp_path / "there"):
        if output.name == "there":
            output.mkdir()
        with pytest.raises(ParityError):
            lora_edge.export(base, {"a": adapters["shout"]}, output=output)
    assert _names(tmp_path) == {"there"}
    assert _names(tmp_path / "there") == set()


def test_test_data_that_cannot_be_written_leave_nothing(
    cli: Cli, copy: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    taken = cli("golden", copy, "--reference", base, "--onnx-test-data", tmp_path / "full")
    assert (taken.code, taken.out) == (2, "")
    assert "is not empty" in taken.err
    assert "data set" not in taken.err

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_edge.graph.backend_data.numpy_helper.from_array", full)
    result = cli("golden", copy, "--reference", base, "--onnx-test-data", tmp_path / "data")
    assert result.code == 2
    assert "No space left" in result.err
    assert _names(tmp_path) == {"bundle", "full"}


# --- nobody reads (C7) ---------------------------------------------------------------------------


def _deaf(arguments: list[object], *, err: bool = False) -> int:
    """Run the command with a stdout (and stderr) whose reader has gone, as ``| head -0`` does."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "lora_edge", *map(str, arguments)]
    try:
        return subprocess.run(
            command, stdout=writer, stderr=writer if err else subprocess.DEVNULL, check=False
        ).returncode
    finally:
        os.close(writer)


def test_a_verdict_is_given_and_its_report_written_though_nobody_reads(
    copy: Path, tmp_path: Path
) -> None:
    report = tmp_path / "r.json"
    options = ["--quick", "--json", report, "--html", tmp_path / "r.html"]
    assert _deaf(["validate", copy, *options]) == 0
    assert json.loads(report.read_text())["passed"]
    assert (tmp_path / "r.html").is_file()
    manifest = json.loads((copy / "lora_edge.json").read_text())
    manifest["adapters"]["echo"]["proved"] = False
    (copy / "lora_edge.json").write_text(json.dumps(manifest))
    assert _deaf(["validate", copy, *options], err=True) == 1
    assert not json.loads(report.read_text())["passed"]


def test_other_verbs_do_their_work_though_nobody_reads(copy: Path, others: dict[str, Path]) -> None:
    assert _deaf(["add", copy, "-a", f"new={others['shout']}"], err=True) == 0
    assert "new" in _whole(copy)
    assert _deaf(["remove", copy, "new"], err=True) == 0
    assert "new" not in _whole(copy)
    assert _deaf(["remove", copy, "new"], err=True) == 2
    assert _deaf(["inspect", copy], err=True) == 0
    assert _deaf(["run", copy, "-p", "Word: river Answer:", "--max-new-tokens", 4]) == 0


# --- names (C8) ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *((name, "device on Windows") for name in ("con", "NUL", "com1", "Lpt9", "aux.v2")),
        ("prn.", "ends in a dot"),
        ("a.", "ends in a dot"),
        ("a..", "ends in a dot"),
        ("Echo", "'echo' and 'Echo' differ in case only"),
        ("None", "reserved"),
        ("BASE", "reserved"),
        ("é", "cannot name"),
        ("a ", "cannot name"),
        ("a/b", "cannot name"),
    ],
)
def test_a_name_that_not_every_system_keeps_is_refused(
    name: str, words: str, cli: Cli, bundle: Path, others: dict[str, Path]
) -> None:
    before = _names(bundle / "adapters")
    result = cli("add", bundle, "-a", f"{name}={others['shout']}")
    assert (result.code, result.out) == (2, "")
    assert words in result.err
    assert _names(bundle / "adapters") == before


@pytest.mark.parametrize("names", [("A", "a"), ("one", "ONE")])
def test_two_new_names_that_differ_in_case_only_are_refused(
    names: tuple[str, str], base: Path, copy: Path, others: dict[str, Path], tmp_path: Path
) -> None:
    given = {name: others[x] for name, x in zip(names, ("shout", "echo"), strict=True)}
    with pytest.raises(lora_edge.AdapterError, match="differ in case only"):
        lora_edge.add(copy, given)
    with pytest.raises(lora_edge.AdapterError, match="differ in case only"):
        lora_edge.export(base, given, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
