"""Graphs with fixed shapes: what they give is what the graph without fixed shapes gives."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import lora_edge
from lora_edge import graph as passes
from lora_edge.bundle.bundle import STATIC_GRAPH_FILE, file_entry, load_bundle
from lora_edge.bundle.manifest import Manifest
from lora_edge.bundle.part import StaticGraph
from lora_edge.clients import catalog
from lora_edge.errors import (
    AdapterError,
    BundleError,
    DataError,
    LoraEdgeError,
    OptionError,
    ParityError,
    UnsupportedModelError,
)
from lora_edge.exporting import mobile
from lora_edge.parity.static import first_whole
from lora_edge.parity.validate_in import validate_in
from lora_edge.reports import html, junit
from lora_edge.runtime import Decoder, ort_format
from lora_edge.runtime.opening import runs_static
from lora_edge.targets.providers import QNN
from lora_edge.targets.table import target
from tests.reports.test_formats import SCHEMA
from tests.support.adapters import make_adapter
from tests.support.commands import exit_code
from tests.support.kinds import make_kinds
from tests.support.paths import MODELS
from tests.support.shipped import CLASSIFIERS

SEQ, PAST = 16, 80
OF_EFFECT = 1e-5
# family -> adapters: grouped queries; a sliding window of 8 with scaled embeddings and norms;
# learned positions and Conv1D.
KINDS = {
    "llama": ("patterns", "dora", "alora"),
    "gemma3": ("scaled-embedding", "offset-norm"),
    "gpt2": ("conv1d", "positions"),
}
ASKED: dict[str, dict[str, Any]] = {
    "llama": {"targets": ["qnn"]},
    "gemma3": {"static": True, "rank": 9},
    "gpt2": {"targets": ["nnapi", "mobile"]},
}
INVOCATION = [7, 9, 11]
Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    @functools.cache
    def export(key: str) -> Path:
        root = tmp_path_factory.mktemp(key)
        base, adapters = make_kinds(key, root, KINDS[key])
        lora_edge.export(base, adapters, output=root / "out", seq=SEQ, past=PAST, **ASKED[key])
        return root / "out"

    return export


def both(bundle: Path) -> tuple[lora_edge.Runner, lora_edge.Runner]:
    """On the graph without fixed shapes, and on the other."""
    return lora_edge.Runner(bundle, threads=1), lora_edge.Runner(bundle, static=True, threads=1)


def rows_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, length).tolist() for length in lengths]


@pytest.mark.parametrize("family", KINDS)
def test_logits_and_tokens_are_those_of_the_other_graph(made: Made, family: str) -> None:
    dynamic, static = both(made(family))
    assert (dynamic.graph_file, static.graph_file) == ("onnx/model.onnx", STATIC_GRAPH_FILE)
    # Below, at and above a run's tokens and the cache's positions, and all that there is room for.
    rows = rows_of(3, SEQ, SEQ + 1, PAST, PAST + 1, PAST + SEQ)
    rows[1][4:7] = rows[4][30:33] = INVOCATION
    off = dynamic.logits(rows)
    for name in (None, *dynamic.adapters):
        expected, found = dynamic.logits(rows, adapter=name), static.logits(rows, adapter=name)
        effect = np.abs(off if name is None else expected - off).max()
        assert effect > 0.05
        assert np.abs(found - expected).max() <= OF_EFFECT * effect, name
        tokens = [each.generate_ids(rows[:3], name, 40) for each in (dynamic, static)]
        assert tokens[0] == tokens[1]
        assert max(map(len, tokens[0])) == 40


def test_a_row_may_be_split_in_any_way_and_rows_may_rest(made: Made) -> None:
    dynamic, static = both(made("llama"))
    (row,) = rows_of(PAST + SEQ)
    states: list[Any] = ["dora", None, {"patterns": 0.5}]
    expected = dynamic.logits([row] * 3, adapter=states)
    for sizes in ([96], [1] * 20 + [60] + [1] * 16, [79, 1, 1, 1, 14], [7] * 13 + [5]):
        decoding = static.start(states, 3, PAST + SEQ)
        start, found = 0, []
        for size in sizes:
            found.append(decoding.extend_all([row[start : start + size]] * 3))
            start += size
        assert start == len(row)
        whole = np.stack([np.concatenate([part[i] for part in found]) for i in range(3)])
        np.testing.assert_allclose(whole, expected, rtol=0, atol=2e-5)
    decoding = static.start(states, 3, 40)
    decoding.prefill([row[:20], row[:3], row[:9]])
    decoding.step([row[20], None, row[9]])
    last = decoding.step([None, row[3], None])[1]
    np.testing.assert_allclose(last, expected[1, 3], rtol=0, atol=2e-5)


def test_rows_in_unlike_states_do_not_mix(made: Made) -> None:
    dynamic, static = both(made("llama"))
    rows = rows_of(9, 30, 17, 5, 24)
    rows[4][10:13] = INVOCATION
    states: list[Any] = ["patterns", "dora", None, {"patterns": -1.5}, "alora"]
    expected, found = dynamic.logits(rows, adapter=states), static.logits(rows, adapter=states)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    other = dynamic.logits(rows, adapter=[states[1], states[0], *states[2:]])
    assert np.abs(other - expected)[:2].max() > 0.05
    assert dynamic.generate_ids(rows, states, 30) == static.generate_ids(rows, states, 30)


def test_every_dimension_is_a_number_and_the_weights_are_the_same_file(made: Made) -> None:
    bundle = made("llama")
    part = load_bundle(bundle).manifest.parts["decoder"]
    assert part.static is not None
    assert (part.static.seq, part.static.past, part.static.rank) == (SEQ, PAST, 5)
    model = onnx.load(bundle / STATIC_GRAPH_FILE, load_external_data=False)
    onnx.checker.check_model(str(bundle / STATIC_GRAPH_FILE))
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        dims = value.type.tensor_type.shape.dim
        assert all(dim.dim_value > 0 and not dim.dim_param for dim in dims), value.name
    known = {x.name for x in (*graph.input, *graph.output, *graph.value_info)}
    assert {name for node in graph.node for name in node.output if name} <= known
    shapes = {
        x.name: [d.dim_value for d in x.type.tensor_type.shape.dim]
        for x in (*graph.input, *graph.output)
    }
    assert shapes["input_ids"] == [1, SEQ]
    assert shapes["attention_mask"] == [1, SEQ + PAST]
    assert shapes["past_key_values.0.key"] == [1, 2, PAST, 32]
    assert shapes["present.0.key"] == [1, 2, SEQ, 32]
    assert shapes["lora.model.layers.0.self_attn.q_proj.A"] == [64, 5]
    assert shapes["lora.model.layers.0.self_attn.q_proj.gate"] == [1, SEQ, 1]
    assert {x.name for x in (bundle / "onnx").iterdir()} >= {"static.onnx", "model.onnx_data"}
    assert len(list((bundle / "onnx").glob("*_data"))) == 1
    assert (bundle / STATIC_GRAPH_FILE).stat().st_size < 300_000


@pytest.mark.parametrize("family", KINDS)
def test_the_export_proves_it_and_so_does_a_validation(made: Made, family: str) -> None:
    bundle = made(family)
    (published,) = (bundle / "parity").glob("report-*.json")
    reports = [json.loads(published.read_text())]
    if family == "gemma3":
        reports.append(lora_edge.validate(bundle).to_data())
    for data in reports:
        assert data["passed"]
        plain, fixed = data["sessions"]
        assert (plain["name"], fixed["name"]) == ("cpu, all", "cpu, all, fixed shapes")
        assert ("graph" in plain, fixed["graph"]) == (False, STATIC_GRAPH_FILE)
        own = [x for x in data["cases"] if x["session"] == fixed["name"]]
        names = {x["name"] for x in own if x["status"] == "passed"}
        assert {"base", *(f"adapter {name}" for name in KINDS[family])} <= names
        assert any(x["kind"] == "mixed" for x in own)
        assert any(x["kind"] == "switch" for x in own)
        assert any(x["kind"] == "blend" for x in own) == (family != "gpt2")
        for case in own:
            for error in (case["controls"] or {}).values():
                assert error > 1e-3
        # A prompt of a hundred tokens; of the others the blends are of too large a rank.
        left = " ".join(fixed["left_out"])
        assert "long" in left
        assert ("blend" in left) == (family == "gpt2")


def test_what_there_is_no_room_for_is_named(made: Made) -> None:
    report = lora_edge.validate(made("gpt2"), depth="quick")
    plain, fixed = report.sessions
    assert not plain.left_out
    assert fixed.left_out
    assert "not run in cpu, all, fixed shapes, which cannot be asked: blend" in report.table()
    data = json.loads(report.to_json())
    assert "not asked: blend 0.7 conv1d" in html(data, [])
    assert "cpu, all, fixed shapes" in junit(data, [])


def _exchange_biases(graph: Path, wrong: Path) -> None:
    """One layer of the graph reads another's bias."""
    model = onnx.load(graph, load_external_data=False)
    named, other = (f"transformer.h.{layer}.mlp.c_fc.bias" for layer in (1, 0))
    for node in model.graph.node:
        node.input[:] = [other if name == named else name for name in node.input]
    onnx.save(model, wrong)


def test_a_wrong_graph_with_fixed_shapes_fails_in_its_session(made: Made, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made("gpt2"), tmp_path / "copy"))
    _exchange_biases(copy / STATIC_GRAPH_FILE, copy / STATIC_GRAPH_FILE)
    bundle = load_bundle(copy)
    with pytest.raises(BundleError, match="differs from its hash"):
        lora_edge.Runner(copy, static=True).logits([[1, 2]])
    files = {**bundle.manifest.files, STATIC_GRAPH_FILE: file_entry(copy / STATIC_GRAPH_FILE)}
    bundle.write_manifest(dataclasses.replace(bundle.manifest, files=files))
    report = lora_edge.validate(copy, depth="quick")
    failed = [case for case in report.cases if case.status == "failed"]
    assert failed
    assert {case.session for case in failed} == {"cpu, all, fixed shapes"}


def test_more_than_there_is_room_for_is_refused(made: Made) -> None:
    static = lora_edge.Runner(made("gpt2"), static=True)
    (row,) = rows_of(60)
    with pytest.raises(DataError, match="the 96 positions of the graph with fixed") as error:
        static.generate_ids([row], max_new_tokens=37)
    assert "max_new_tokens=36" in error.value.hint
    assert len(static.generate_ids([row], "conv1d", 36)[0]) == 36
    with pytest.raises(DataError, match=r"97 positions .* the graph with fixed shapes has 96"):
        static.logits(rows_of(97))
    blend = {"conv1d": 0.5, "positions": 0.5}
    with pytest.raises(DataError, match=r"blend of conv1d and positions has rank 6 .* for 3"):
        static.logits([row], adapter=blend)
    with pytest.raises(DataError, match="pinned"):
        lora_edge.Runner(made("gpt2"), static=True, pinned=["conv1d"])


def test_a_larger_rank_leaves_room_for_blends_and_for_adapters_to_come(
    made: Made, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(made("gemma3"), tmp_path / "copy"))
    dynamic, static = both(copy)
    rows = rows_of(20, 4)
    blend = {"scaled-embedding": 0.7, "offset-norm": -0.4}
    expected, found = (x.logits(rows, adapter=blend) for x in (dynamic, static))
    effect = np.abs(expected - dynamic.logits(rows)).max()
    assert np.abs(found - expected).max() <= OF_EFFECT * effect
    base, layers = made("gemma3").parent / "base", {"target_modules": ["v_proj"], "lora_alpha": 4}
    lora_edge.add(copy, {"fits": make_adapter(base, tmp_path / "fits", r=9, **layers)})
    dynamic, static = both(copy)
    expected, found = (x.logits(rows, adapter="fits") for x in (dynamic, static))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    larger = make_adapter(base, tmp_path / "larger", r=10, **layers)
    with pytest.raises(AdapterError, match=r"larger has rank 10 at .*v_proj.* room for 9") as error:
        lora_edge.add(copy, {"larger": larger})
    assert "--rank 10" in error.value.hint
    assert "larger" not in load_bundle(copy).manifest.adapters


def test_an_adapter_of_a_larger_rank_than_was_asked_for_is_refused(
    made: Made, tmp_path: Path
) -> None:
    root = made("gpt2").parent
    adapters = {"conv1d": root / "conv1d"}
    with pytest.raises(AdapterError, match=r"conv1d has rank 3 at .* room for 2"):
        lora_edge.export(root / "base", adapters, output=tmp_path / "out", static=True, rank=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_merged_bundle_has_one_too(made: Made, tmp_path: Path) -> None:
    root = made("gpt2").parent
    adapters = {"conv1d": root / "conv1d"}
    merged = lora_edge.export(
        root / "base", adapters, "merged", tmp_path / "merged", static=True, seq=8, past=24
    )
    part = merged.manifest.parts["decoder"]
    assert part.static is not None
    assert (part.static.rank, part.static.room) == (0, 32)
    dynamic, static = both(merged.directory)
    rows = rows_of(30, 3)
    np.testing.assert_allclose(static.logits(rows), dynamic.logits(rows), rtol=0, atol=2e-5)


def test_it_runs_where_shapes_must_be_fixed_or_where_it_is_asked_for(made: Made) -> None:
    bundle = load_bundle(made("llama"))
    assert runs_static(bundle, "qnn", None)
    assert runs_static(bundle, "NnapiExecutionProvider", None)
    assert not runs_static(bundle, "qnn", False)
    assert not runs_static(bundle, "cpu", None)
    assert runs_static(bundle, "cpu", True)
    part = dataclasses.replace(bundle.manifest.parts["decoder"], static=None)
    without = dataclasses.replace(bundle.manifest, parts={"decoder": part})
    plain = dataclasses.replace(bundle, manifest=without)
    assert not runs_static(plain, "qnn", None)
    with pytest.raises(BundleError, match="no graph with fixed shapes"):
        runs_static(plain, "cpu", True)


def test_a_manifest_of_an_earlier_release_has_none(made: Made) -> None:
    data = json.loads(load_bundle(made("llama")).manifest.to_json())
    del data["parts"]["decoder"]["static"]
    manifest = Manifest.from_json(json.dumps(data))
    assert manifest.parts["decoder"].static is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"file": "onnx/other.onnx"}, "none of the bundle's own"),
        ({"file": "onnx/model.onnx"}, "none of the bundle's own"),
        ({"rank": 0}, "rank is 0, and the graph has"),
        ({"past": 1000}, "1016 positions, and the model 128"),
        ({"seq": 0}, "seq"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    made: Made, changes: dict[str, Any], said: str
) -> None:
    data = json.loads(load_bundle(made("llama")).manifest.to_json())
    data["parts"]["decoder"]["static"] |= changes
    with pytest.raises(BundleError, match=said):
        Manifest.from_json(json.dumps(data))


def test_a_graph_of_other_sizes_than_the_manifest_says_is_refused(
    made: Made, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(made("llama"), tmp_path / "copy"))
    bundle = load_bundle(copy)
    part = bundle.manifest.parts["decoder"]
    assert part.static is not None
    for field, value in (("seq", 8), ("past", 40), ("rank", 4)):
        static = dataclasses.replace(part.static, **{field: value})
        parts = {"decoder": dataclasses.replace(part, static=static)}
        bundle.write_manifest(dataclasses.replace(bundle.manifest, parts=parts))
        with pytest.raises(BundleError, match="but the manifest says"):
            lora_edge.Runner(copy, static=True)


@pytest.mark.parametrize(
    ("options", "said", "hint"),
    [
        ({"seq": 8}, "seq is 8, expected none but of a graph with fixed shapes", "--static"),
        ({"static": True, "seq": 0}, "seq is 0", ""),
        ({"static": True, "past": True}, "past is True, expected a whole number", ""),
        ({"static": True, "rank": "8"}, "rank is '8', expected a whole number", ""),
        ({"static": True, "seq": 100, "past": 29}, "are 129, and the model has 128", "--seq"),
        ({"static": True, "form": "fused"}, "--form fused is not for --static", "portable"),
        ({"targets": ["qnn"], "form": "fused"}, "--form fused is not for qnn", "portable"),
        ({"static": True, "backend": "optimum"}, "optimum backend does not make", "--static"),
        ({"static": True, "precision": "fp16"}, "in fp32, got --precision fp16", "fp32"),
        ({"static": True, "precision": "int4"}, "no weights in int4", "fp32"),
        ({"static": True, "rank": 4, "mode": "merged"}, "a merged bundle has no ranks", "--rank"),
    ],
)
def test_what_cannot_be_is_refused(
    made: Made, tmp_path: Path, options: dict[str, Any], said: str, hint: str
) -> None:
    root = made("gpt2").parent
    with pytest.raises(LoraEdgeError, match=said) as error:
        lora_edge.export(
            root / "base", {"conv1d": root / "conv1d"}, output=tmp_path / "out", **options
        )
    assert hint in str(error.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_other_tasks_have_none(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="text generators, got text-classification"):
        lora_edge.export(MODELS / "tiny-bert", CLASSIFIERS, output=tmp_path / "x", targets=["qnn"])


def test_the_constants_of_a_run_are_what_they_were(made: Made) -> None:
    """No weight was folded: what the graph itself holds is small."""
    model = onnx.load(made("llama") / STATIC_GRAPH_FILE, load_external_data=False)
    inside = [x for x in model.graph.initializer if not x.external_data]
    assert all(numpy_helper.to_array(x).nbytes <= 1024 for x in inside)


def test_pytorch_is_compared_on_a_session_of_any_length(made: Made) -> None:
    bundle = load_bundle(made("llama"))
    first_whole(bundle, "cpu")
    with pytest.raises(OptionError, match="qnn runs the graph with fixed shapes") as error:
        first_whole(bundle, "qnn")
    assert "--provider cpu --provider qnn" in error.value.hint


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_driver_without_lora_edge_does_what_the_page_says(made: Made, family: str) -> None:
    report = validate_in({"static": None}, made(family), depth="quick")
    assert report.passed, report.table()
    jsonschema.validate(json.loads(report.to_json()), SCHEMA)
    (session,) = report.sessions
    assert (session.name, session.graph) == ("static", STATIC_GRAPH_FILE)
    names = {case.name for case in report.cases}
    assert {"base", *(f"adapter {name}" for name in KINDS[family])} <= names
    assert any(case.kind == "mixed" for case in report.cases)


@pytest.mark.parametrize("share", [1.0, 0.8])
def test_a_client_that_computes_in_float16_is_judged_as_drift(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    driver = tmp_path / "rounding.py"
    driver.write_text(f"""
import numpy as np
import static
from talk import talk

exact = static.adapted

def rounded(bundle, state):
    invocation, fed = exact(bundle, state)
    half = {{name: np.float32(np.float16(x * {share})) for name, x in fed.items()}}
    return invocation, fed | {{name: x for name, x in half.items() if name.endswith(".B")}}

static.adapted = rounded
one = static.Static(False)
talk({{order: getattr(one, order) for order in ("open", "start", "extend")}})
""")
    monkeypatch.setenv("PYTHONPATH", str(catalog._DRIVERS))
    kind = catalog.ClientKind("rounding", QNN, str(driver), static=True)
    monkeypatch.setattr(catalog, "CLIENTS", (*catalog.CLIENTS, kind))
    report = validate_in({"rounding": None}, made("gpt2"), depth="quick")
    assert report.exact, report.table()
    assert [session.name for session in report.sessions] == ["cpu, all, fixed shapes", "rounding"]
    assert len(report.drift) == 1 + len(KINDS["gpt2"])
    (case,) = (case for case in report.drift if case.adapters == ("conv1d",))
    assert case.drift is not None
    assert case.drift.retained == pytest.approx(share, abs=0.05)
    assert case.drift.effect_error > 1e-5
    assert (case.status == "passed") == (share == 1.0)
    assert case.status == "passed" or "with rounding, which computes in float16" in case.reason
    jsonschema.validate(json.loads(report.to_json()), SCHEMA)
    assert "float16 against float32" in report.table()


def test_a_client_of_fixed_shapes_asks_for_them(made: Made) -> None:
    bundle = load_bundle(made("gpt2"))
    part = dataclasses.replace(bundle.manifest.parts["decoder"], static=None)
    plain = dataclasses.replace(bundle.manifest, parts={"decoder": part})
    with pytest.raises(OptionError, match=r"static runs graphs with fixed shapes, and .* has none"):
        validate_in({"static": None}, dataclasses.replace(bundle, manifest=plain))


def test_a_bundle_for_phones_has_its_graphs_in_onnx_runtimes_format(made: Made) -> None:
    bundle = load_bundle(made("gpt2"))
    names = [f"mobile/{x}" for x in ("model.ort", "required_operators.config", "static.ort")]
    assert sorted(x for x in bundle.manifest.files if x.startswith("mobile/")) == names
    config = (bundle.directory / names[1]).read_text().splitlines()
    assert config[:3] == ["# Generated from model/s:", "# - model.ort", "# - static.ort"]
    assert any(line.startswith("ai.onnx;13;") and "MatMul" in line for line in config)
    assert not any("/" in line for line in config[1:])
    part = bundle.manifest.parts["decoder"]
    assert part.static is not None
    rows = rows_of(20, 5)
    for runner, file in zip(both(bundle.directory), ("model.ort", "static.ort"), strict=True):
        path = f"mobile/{file}"
        own = dataclasses.replace(
            part,
            file=path if file == "model.ort" else part.file,
            static=None if file == "model.ort" else dataclasses.replace(part.static, file=path),
        )
        manifest = dataclasses.replace(bundle.manifest, parts={"decoder": own})
        again = lora_edge.Runner(
            dataclasses.replace(bundle, manifest=manifest), static=file == "static.ort", threads=1
        )
        assert again.graph_file == path
        for name in (None, *runner.adapters):
            expected = runner.logits(rows, adapter=name)
            np.testing.assert_allclose(again.logits(rows, adapter=name), expected, atol=1e-5)
    # So each file runs where nothing else of the bundle is.
    assert ort.InferenceSession((bundle.directory / names[0]).read_bytes()).get_inputs()


def test_a_file_for_phones_that_does_something_else_is_found(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(made("gpt2"), tmp_path / "copy"))
    shutil.rmtree(copy / "mobile")
    write_ort = ort_format.write_ort

    def wrong(graph: Path, target: Path, level: str) -> None:
        if graph.name == "static.onnx":
            _exchange_biases(graph, graph.with_name("wrong.onnx"))
            graph = graph.with_name("wrong.onnx")
        write_ort(graph, target, level)

    monkeypatch.setattr(ort_format, "write_ort", wrong)
    with pytest.raises(ParityError, match=r"mobile/static.ort does not do what adapter conv1d"):
        mobile.write_mobile(load_bundle(copy), lambda _: None)


def test_what_phones_may_take_is_said(made: Made) -> None:
    card = (made("gpt2") / "README.md").read_text()
    for provider in ("nnapi", "coreml"):
        found = re.search(rf"- onnx/static.onnx on {provider}: (\d+) of (\d+) nodes, in \d", card)
        assert found is not None
        taken, nodes = map(int, found.groups())
        assert 0.9 * nodes < taken < nodes
    assert "usability checker" not in (made("llama") / "README.md").read_text()
    assert mobile.phones(load_bundle(made("llama")), [target("cpu"), target("qnn")]) == []
    (line,) = mobile.phones(load_bundle(made("llama")), [target("coreml")])
    assert line.startswith("onnx/static.onnx on coreml: ")


def test_weights_that_the_format_has_no_room_for_are_refused(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(made("gpt2"))
    parts = tuple(bundle.manifest.parts.values())
    mobile.check_size(bundle.directory, parts)
    monkeypatch.setattr(ort_format, "MOST_BYTES", 1000)
    with pytest.raises(UnsupportedModelError, match=r"model.onnx_data has .* has room for 1,000"):
        mobile.check_size(bundle.directory, parts)


@pytest.mark.parametrize(("seq", "past"), [(5, 3), (1, 20), (4, 4), (7, 15)])
def test_any_sizes_and_any_split(made: Made, tmp_path: Path, seq: int, past: int) -> None:
    """A cache smaller than a run, runs of one token, and what is no multiple of anything."""
    copy = Path(shutil.copytree(made("llama"), tmp_path / "copy"))
    model = passes.load(copy / "onnx/model.onnx")
    passes.fix_shapes(model, seq, past, 6)
    passes.save_graph(model, copy / "onnx/other.onnx")
    part = load_bundle(copy).manifest.parts["decoder"]
    own = dataclasses.replace(part, static=StaticGraph("onnx/other.onnx", seq, past, 6))
    static = Decoder(copy, {"decoder": own.in_fixed_shapes()}, threads=1)
    dynamic = lora_edge.Runner(copy, threads=1)
    (row,) = rows_of(seq + past, seed=seq)
    expected = dynamic.logits([row])[0]
    random = np.random.default_rng(past)
    for _ in range(4):
        decoding, found = static.start(1, len(row)), []
        while sum(map(len, found)) < len(row):
            start = sum(map(len, found))
            found += decoding.extend_all([row[start : start + int(random.integers(1, 9))]])
        np.testing.assert_allclose(np.concatenate(found), expected, rtol=0, atol=2e-5)
    with pytest.raises(DataError, match=f"{len(row) + 1} positions .* has {len(row)}"):
        static.start(1, len(row) + 1)


def test_the_command_shows_it(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["inspect", str(made("gemma3"))]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "static fixed shapes: one row, 16 tokens of a run behind 80 positions" in said
    assert "rank up to 9" in said
    card = (made("gemma3") / "README.md").read_text()
    assert f"`{STATIC_GRAPH_FILE}` is the same graph with fixed shapes: one row" in card
