"""Optimized graphs that are kept on the device: the same numbers, from a file that fits or none."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

import lora_edge
from lora_edge import Runner
from lora_edge.bundle.bundle import (
    BASE_GRAPH_FILE,
    ROWS_GRAPH_FILE,
    SINGLE_GRAPH_FILE,
    file_entry,
    load_bundle,
)
from lora_edge.cli import cli
from lora_edge.errors import BundleError, LoraEdgeError
from lora_edge.runtime import prepared, routes
from lora_edge.runtime.adapters.by_row import pays
from tests.support.examples import examples
from tests.support.kinds import make_kinds
from tests.support.watching import watched_routes

IDS = [[5, 9, 3, 11, 40, 2]]


@pytest.fixture(autouse=True)
def _always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_WORTH", 0)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graphs that were prepared, as they are."""
    names: list[str] = []
    plain = prepared.PreparedGraphs._prepare

    def prepare(self: Any, name: str, *rest: Any) -> Path | None:
        found = plain(self, name, *rest)
        if found is not None:
            names.append(name)
        return found

    monkeypatch.setattr(prepared.PreparedGraphs, "_prepare", prepare)
    return names


def _answers(bundle: Path, cache: Any) -> dict[str, np.ndarray]:
    runner = Runner(bundle, session_cache=cache, threads=1)
    states = [None, *runner.adapters]
    found = {"half": runner.logits(IDS, adapter={runner.adapters[0]: 0.5})}
    found |= {str(state): runner.logits(IDS, adapter=state) for state in states}
    found["mixed"] = runner.logits(IDS * len(states), adapter=states)
    return found


def _assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    for name, value in wanted.items():
        # Unlike rows are added up in another order where each has its own pairs.
        limit = 1e-5 if name == "mixed" else 0
        np.testing.assert_allclose(found[name], value, rtol=0, atol=limit, err_msg=name)


def _folder(cache: Path) -> Path:
    (folder,) = [path for path in cache.iterdir() if not path.name.startswith(".")]
    return folder


def test_kept_graphs_give_the_same_to_the_bit(
    exported: Path, tmp_path: Path, made: list[str]
) -> None:
    wanted = _answers(exported, cache=False)
    assert not made
    _assert_same(_answers(exported, tmp_path), wanted)
    assert made == ["onnx/model.onnx", BASE_GRAPH_FILE, SINGLE_GRAPH_FILE, ROWS_GRAPH_FILE]
    # Both read one file.
    assert len(list(_folder(tmp_path).rglob("*.data"))) == 1
    _assert_same(_answers(exported, tmp_path), wanted)
    assert len(made) == 4


def test_a_batch_runs_on_the_smallest_graph_that_serves_it(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    plain = prepared.PreparedGraphs.open

    def note(self: Any, graph: Path, *rest: Any) -> Any:
        opened.append(graph.name)
        return plain(self, graph, *rest)

    monkeypatch.setattr(prepared.PreparedGraphs, "open", note)
    runner = Runner(exported, session_cache=tmp_path, threads=1)
    assert opened == []
    off = runner.logits(IDS)
    assert opened == ["base.onnx", "model.onnx"]  # the first time, to compare
    switchable = runner.decoder.start(1, 9, runner.binding(None, 1)).extend_all(IDS)[0]
    np.testing.assert_array_equal(off[0], switchable)
    one, other = runner.adapters[:2]
    on = runner.logits(IDS, adapter=one)
    assert opened[2:] == ["single.onnx"]
    switchable = runner.decoder.start(1, 9, runner.binding(one, 1)).extend_all(IDS)[0]
    np.testing.assert_allclose(on[0], switchable, atol=1e-5)
    blend = {one: 0.7, other: 0.3}
    mixed = runner.logits(IDS * 2, adapter=[blend, None])
    np.testing.assert_allclose(runner.logits(IDS, adapter=blend)[0], mixed[0], atol=1e-5)
    half = runner.logits(IDS * 2, adapter=[{one: 0.5}, other])
    np.testing.assert_allclose(runner.logits(IDS, adapter={one: 0.5})[0], half[0], atol=1e-5)
    assert opened[3:] == ["rows.onnx"]
    # Later, each only when it is needed.
    again = Runner(exported, session_cache=tmp_path, threads=1)
    np.testing.assert_array_equal(again.logits(IDS), off)
    np.testing.assert_array_equal(again.logits(IDS, adapter=one), on)
    np.testing.assert_array_equal(again.logits(IDS * 2, adapter=[{one: 0.5}, other]), half)
    assert opened[4:] == ["base.onnx", "single.onnx", "rows.onnx"]
    many = again.logits(IDS * 8, adapter=[one, other] * 4)
    assert opened[7:] == ["model.onnx"]
    np.testing.assert_allclose(many[0], on[0], atol=1e-5)


def test_rows_with_pairs_of_their_own(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of unlike lengths, weights, blends and rest, against each row alone and the gates."""
    monkeypatch.setattr(routes, "pays", lambda _: True)
    runner = Runner(exported, session_cache=tmp_path, threads=1)
    one, other, *_ = runner.adapters
    rows = [[5, 9, 3], [7], [11, 40, 2, 6, 1], [8, 8], [4, 2]]
    states = [one, None, {one: 0.5, other: -1.0}, {other: 2.0}, one]
    decoding = runner.start(states, 5, 12)
    assert decoding.decoder.part.file == ROWS_GRAPH_FILE
    gated = runner.decoder.start(5, 12, runner.binding(states, 5))
    alone = [runner.decoder.start(1, 12, runner.binding(state, 1)) for state in states]
    found, wanted = decoding.prefill(rows), gated.prefill(rows)
    each = np.concatenate([x.prefill([row]) for x, row in zip(alone, rows, strict=True)])
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(found, each, atol=1e-5)
    for tokens in ([3, 4, None, 6, 7], [1, None, 2, 3, 4]):
        found, wanted = decoding.step(tokens), gated.step(tokens)
        for row, token in enumerate(tokens):
            if token is not None:
                np.testing.assert_allclose(found[row], wanted[row], atol=1e-5)
                np.testing.assert_allclose(found[row], alone[row].step([token])[0], atol=1e-5)
    # The control: rows in another order are another batch.
    turned = runner.start(states[::-1], 5, 12)
    assert np.abs(turned.prefill(rows) - each).max() > 1e-3


def test_every_kind_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors and gains are chosen by row; pairs at embeddings have no such graph."""
    monkeypatch.setattr(routes, "pays", lambda _: True)
    names = ("dora", "lora-bias", "plain")
    base, adapters = make_kinds("llama", tmp_path, names)
    bundle = lora_edge.export(base, adapters, output=tmp_path / "b").directory
    runner = Runner(bundle, session_cache=tmp_path / "cache")
    mixed = runner.logits(IDS * 4, adapter=[*names, None])
    assert runner.start([*names, None], 4, 9).decoder.part.file == ROWS_GRAPH_FILE
    for row, state in enumerate([*names, None]):
        own = runner.logits(IDS, adapter=state)
        np.testing.assert_allclose(mixed[row], own[0], atol=1e-5)
    base, adapters = make_kinds("llama", tmp_path / "other", ("embedding", "plain"))
    bundle = lora_edge.export(base, adapters, output=tmp_path / "c").directory
    assert not (bundle / ROWS_GRAPH_FILE).exists()
    runner = Runner(bundle, session_cache=tmp_path / "cache")
    mixed = runner.logits(IDS * 2, adapter=["embedding", "plain"])
    np.testing.assert_allclose(mixed[0], runner.logits(IDS, adapter="embedding")[0], atol=1e-5)


def test_rows_of_few_bits(
    base: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8 activations make of another last bit another code, which is not taken for a fault."""
    monkeypatch.setattr(routes, "pays", lambda _: True)
    bundle = lora_edge.export(base, adapters, output=tmp_path / "b", precision="int4").directory
    runner = Runner(bundle, session_cache=tmp_path / "cache")
    states = [*runner.adapters, None]
    mixed = runner.logits(IDS * len(states), adapter=states)
    assert runner.start(states, len(states), 9).decoder.part.file == ROWS_GRAPH_FILE
    off = runner.logits(IDS)[0]
    for row, state in zip(mixed, states, strict=True):
        own = runner.logits(IDS, adapter=state)[0]
        effect = np.linalg.norm(own - off)
        assert np.linalg.norm(row - own) <= 0.1 * effect
    np.testing.assert_array_equal(mixed[-1], off)
    assert effect == 0
    # The control: what is a fault is told all the same.
    _computes_something_else(bundle, ROWS_GRAPH_FILE)
    with pytest.raises(BundleError, match=f"{ROWS_GRAPH_FILE}, .* does not give what it gives"):
        Runner(bundle, session_cache=tmp_path / "cache").logits(IDS * 2, adapter=states[:2])


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ("ab", True),
        ("abcdefgh", True),
        ("aaaaaaab", False),
        ("a-------", False),
        ("aabbccdd", True),
    ],
)
def test_rows_of_few_adapters_share_them(states: str, expected: bool) -> None:
    assert pays([() if x == "-" else ((x, 1.0),) for x in states]) == expected


def test_damage_is_told_before_a_session_is_needed(bundle: Path, tmp_path: Path) -> None:
    with (bundle / "onnx" / "model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match=r"onnx/model\.onnx"):
        Runner(bundle, session_cache=tmp_path / "cache")


def test_an_adapter_that_begins_at_a_token_runs_on_the_switchable_graph(
    tmp_path: Path, made: list[str]
) -> None:
    base, adapters = make_kinds("llama", tmp_path, ("alora", "all-linear"))
    bundle = lora_edge.export(base, adapters, output=tmp_path / "b").directory
    invocation = load_bundle(bundle).manifest.adapters["alora"].invocation
    ids = [[5, *invocation, 7, 8]]
    plain = Runner(bundle, session_cache=False)
    runner = Runner(bundle, session_cache=tmp_path / "cache")
    np.testing.assert_array_equal(
        runner.logits(ids, adapter="alora"), plain.logits(ids, adapter="alora")
    )
    assert SINGLE_GRAPH_FILE not in made
    runner.logits(ids, adapter="all-linear")
    assert SINGLE_GRAPH_FILE in made


def test_no_rows_are_refused_as_ever(exported: Path, tmp_path: Path) -> None:
    said = []
    for cache in (False, tmp_path):
        with pytest.raises(LoraEdgeError) as refused:
            Runner(exported, session_cache=cache).generate_ids([])
        said.append(str(refused.value))
    assert said[0] == said[1]


def test_the_smaller_graphs_are_compared_once(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = watched_routes(monkeypatch)
    for _ in range(2):
        _answers(exported, tmp_path)
    assert compared == [BASE_GRAPH_FILE, SINGLE_GRAPH_FILE, ROWS_GRAPH_FILE]


def _computes_something_else(bundle: Path, name: str) -> None:
    """Change the first norm of one of a bundle's graphs, and sign it."""
    path = bundle / name
    model = onnx.load(path, load_external_data=False)
    norms = [x for x in model.graph.node if "LayerNormalization" in x.op_type]
    for attribute in norms[0].attribute:
        if attribute.name == "epsilon":
            attribute.f = 0.5
    onnx.save(model, path)
    manifest = load_bundle(bundle).manifest
    signed = replace(manifest, files={**manifest.files, name: file_entry(path)})
    (bundle / "lora_edge.json").write_text(signed.to_json())


@pytest.mark.parametrize("name", [BASE_GRAPH_FILE, SINGLE_GRAPH_FILE, ROWS_GRAPH_FILE])
def test_a_smaller_graph_that_computes_something_else_is_refused(
    name: str, bundle: Path, tmp_path: Path
) -> None:
    _computes_something_else(bundle, name)
    runner = Runner(bundle, session_cache=tmp_path / "cache")
    adapter = None if name == BASE_GRAPH_FILE else runner.adapters[0]
    rows = runner.adapters[:2] if name == ROWS_GRAPH_FILE else [adapter]
    with pytest.raises(BundleError, match=f"{name}, .* does not give what it gives"):
        runner.logits(IDS * len(rows), adapter=rows)


def test_a_bundle_of_before_has_no_graph_without_gates(bundle: Path, tmp_path: Path) -> None:
    wanted = _answers(bundle, cache=False)
    manifest = load_bundle(bundle).manifest
    files = {name: entry for name, entry in manifest.files.items() if name != SINGLE_GRAPH_FILE}
    (bundle / "lora_edge.json").write_text(replace(manifest, files=files).to_json())
    (bundle / SINGLE_GRAPH_FILE).unlink()
    _assert_same(_answers(bundle, tmp_path / "cache"), wanted)


@pytest.mark.parametrize("what", ["onnxruntime", "build", "processor"])
def test_another_device_makes_its_own(
    what: str,
    exported: Path,
    tmp_path: Path,
    made: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _ = Runner(exported, session_cache=tmp_path).session
    if what == "onnxruntime":
        monkeypatch.setattr(onnxruntime, "__version__", "1.99.0")
    elif what == "build":
        monkeypatch.setattr(onnxruntime, "get_build_info", lambda: "another")
    else:
        monkeypatch.setattr(prepared, "processor", lambda: "another")
    _ = Runner(exported, session_cache=tmp_path).session
    assert made == ["onnx/model.onnx"] * 2
    assert len(list(tmp_path.glob("*/prepared.json"))) == 2


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


_SHORT = {("weights.data", _cut), ("model-*.onnx", _flip), ("prepared.json", Path.unlink)}


@pytest.mark.parametrize(
    ("file", "harm"),
    examples(
        itertools.product(
            ("weights.data", "model-*.onnx", "prepared.json"), (_cut, _flip, Path.unlink)
        ),
        _SHORT,
    ),
)
def test_what_is_damaged_is_made_again(
    file: str, harm: Callable[[Path], None], exported: Path, tmp_path: Path, made: list[str]
) -> None:
    wanted = _answers(exported, cache=False)
    _answers(exported, tmp_path)
    (path,) = _folder(tmp_path).glob(file)
    harm(path)
    for _ in range(2):
        _assert_same(_answers(exported, tmp_path), wanted)
    assert len(made) == 8
    assert len(list(_folder(tmp_path).rglob("*.data"))) == 1


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
        _ = Runner(exported, session_cache=tmp_path).session
        folders += sorted(set(tmp_path.glob("*/")) - before)
        size = prepared._bytes(folders[0])
        # Room for two, and a little.
        monkeypatch.setattr(prepared.PreparedGraphs.__init__, "__defaults__", (None, size * 5 // 2))
    assert [folder.exists() for folder in folders] == [False, True, True]


def test_weights_larger_than_the_limit_are_not_kept(exported: Path, tmp_path: Path) -> None:
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
