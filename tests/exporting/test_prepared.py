"""Optimized graphs that are kept on the device: the same numbers, from a file that fits or none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner

import lora_edge
from lora_edge import Runner
from lora_edge.bundle.bundle import BASE_GRAPH_FILE
from lora_edge.cli import cli
from lora_edge.runtime import prepared

IDS = [[5, 9, 3, 11, 40, 2]]


@pytest.fixture(autouse=True)
def _always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_WORTH", 0)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graphs that were prepared, as they are."""
    names: list[str] = []
    plain = prepared.PreparedGraphs._prepare

    def prepare(self: Any, name: str, graph: Path, start: Any) -> Path | None:
        found = plain(self, name, graph, start)
        if found is not None:
            names.append(name)
        return found

    monkeypatch.setattr(prepared.PreparedGraphs, "_prepare", prepare)
    return names


def _answers(bundle: Path, cache: Any) -> dict[str, np.ndarray]:
    runner = Runner(bundle, session_cache=cache, threads=1)
    states = [None, *runner.adapters]
    found = {str(state): runner.logits(IDS, adapter=state) for state in states}
    found["mixed"] = runner.logits(IDS * len(states), adapter=states)
    return found


def _assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def _folder(cache: Path) -> Path:
    (folder,) = [path for path in cache.iterdir() if not path.name.startswith(".")]
    return folder


def test_kept_graphs_give_the_same_to_the_bit(
    exported: Path, tmp_path: Path, made: list[str]
) -> None:
    wanted = _answers(exported, cache=False)
    assert not made
    _assert_same(_answers(exported, tmp_path), wanted)
    assert made == ["onnx/model.onnx", BASE_GRAPH_FILE]
    # Both read one file.
    assert len(list(_folder(tmp_path).rglob("*.data"))) == 1
    _assert_same(_answers(exported, tmp_path), wanted)
    assert len(made) == 2


def test_no_adapter_is_the_graph_without_branches(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    plain = prepared.PreparedGraphs.open

    def note(self: Any, graph: Path, start: Any) -> Any:
        opened.append(graph.name)
        return plain(self, graph, start)

    monkeypatch.setattr(prepared.PreparedGraphs, "open", note)
    runner = Runner(exported, session_cache=tmp_path, threads=1)
    assert opened == ["model.onnx"]
    off = runner.logits(IDS)
    assert opened == ["model.onnx", "base.onnx"]
    switchable = runner.decoder.start(1, 9, runner.binding(None, 1)).extend_all(IDS)[0]
    np.testing.assert_array_equal(off[0], switchable)
    runner.logits(IDS, adapter=runner.adapters[0])
    runner.logits(IDS)
    assert len(opened) == 2


def test_the_graph_without_branches_is_compared_once(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_edge.runtime.pinned import PinnedSessions

    compared: list[Any] = []
    plain = PinnedSessions._check_opened

    def check(self: Any, decoder: Any, state: Any) -> None:
        compared.append(state)
        plain(self, decoder, state)

    monkeypatch.setattr(PinnedSessions, "_check_opened", check)
    for _ in range(2):
        Runner(exported, session_cache=tmp_path).logits(IDS)
    assert compared == [()]


@pytest.mark.parametrize("what", ["onnxruntime", "build", "processor"])
def test_another_device_makes_its_own(
    what: str,
    exported: Path,
    tmp_path: Path,
    made: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Runner(exported, session_cache=tmp_path)
    if what == "onnxruntime":
        monkeypatch.setattr(onnxruntime, "__version__", "1.99.0")
    elif what == "build":
        monkeypatch.setattr(onnxruntime, "get_build_info", lambda: "another")
    else:
        monkeypatch.setattr(prepared, "processor", lambda: "another")
    Runner(exported, session_cache=tmp_path)
    assert made == ["onnx/model.onnx"] * 2
    assert len(list(tmp_path.glob("*/prepared.json"))) == 2


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [_cut, _flip, Path.unlink])
@pytest.mark.parametrize("file", ["weights.data", "model-*.onnx", "prepared.json"])
def test_what_is_damaged_is_made_again(
    file: str, harm: Callable[[Path], None], exported: Path, tmp_path: Path, made: list[str]
) -> None:
    wanted = _answers(exported, cache=False)
    _answers(exported, tmp_path)
    (path,) = _folder(tmp_path).glob(file)
    harm(path)
    _assert_same(_answers(exported, tmp_path), wanted)
    assert len(made) == 4
    assert len(list(_folder(tmp_path).rglob("*.data"))) == 1
    _assert_same(_answers(exported, tmp_path), wanted)


def test_a_graph_that_onnxruntime_refuses_is_not_used(exported: Path, tmp_path: Path) -> None:
    wanted = _answers(exported, cache=False)
    _answers(exported, tmp_path)
    folder = _folder(tmp_path)
    (graph,) = folder.glob("model-*.onnx")
    graph.write_bytes(b"no graph")
    record = json.loads((folder / "prepared.json").read_text())
    (entry,) = [entry for name, entry in record.items() if name.startswith("onnx/model.onnx ")]
    entry["sha256"] = prepared.hash_file(graph)
    (folder / "prepared.json").write_text(json.dumps(record))
    _assert_same(_answers(exported, tmp_path), wanted)


def test_the_longest_unused_goes_first(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []
    for kind in ("a", "b", "c"):
        monkeypatch.setattr(prepared, "processor", lambda kind=kind: kind)
        before = set(tmp_path.glob("*/"))
        Runner(exported, session_cache=tmp_path)
        folders += sorted(set(tmp_path.glob("*/")) - before)
        size = prepared._bytes(folders[0])
        # Room for two, and a little.
        monkeypatch.setattr(prepared.PreparedGraphs.__init__, "__defaults__", (None, size * 5 // 2))
    assert [folder.exists() for folder in folders] == [False, True, True]


def test_weights_larger_than_the_limit_are_not_kept(exported: Path, tmp_path: Path) -> None:
    from lora_edge.bundle.bundle import load_bundle

    graphs = prepared.PreparedGraphs(load_bundle(exported), tmp_path, limit=1000)
    assert not graphs.worth


def test_bundles_of_one_base_share_its_weights(
    exported: Path, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    name, folder = next(iter(adapters.items()))
    other = lora_edge.export(base, {name: folder}, output=tmp_path / "b", sites="adapters")
    cache = tmp_path / "cache"
    for bundle in (exported, other.directory):
        _assert_same(_answers(bundle, cache), _answers(bundle, cache=False))
    assert len(list(_folder(cache).rglob("*.data"))) == 1
    assert len(list(_folder(cache).glob("*.onnx"))) > 2


def test_a_folder_that_takes_no_files_is_told_once_and_done_without(
    exported: Path, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    wanted = _answers(exported, cache=False)
    with pytest.warns(UserWarning, match="keeps no prepared graph"):
        found = _answers(exported, blocked)
    _assert_same(found, wanted)


def test_a_full_disk_is_done_without(
    exported: Path, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(prepared.shutil, "disk_usage", lambda _: usage)
    _assert_same(_answers(exported, tmp_path), _answers(exported, cache=False))
    assert not made


def test_the_command_keeps_them_unless_it_is_told_not_to(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_EDGE_CACHE", str(tmp_path))
    assert prepared.user_folder() == tmp_path / "sessions"
    asked: list[Any] = []

    def runner(*_: Any, **options: Any) -> Any:
        asked.append(options["session_cache"])
        raise click.Abort

    monkeypatch.setattr("lora_edge.runtime.Runner", runner)
    for words in ((), ("--no-cache",)):
        CliRunner().invoke(cli, ["run", str(exported), "--prompt", "ab", *words])
    assert asked == [True, False]
