"""The whole path: export, switch, merge, add, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import lora_edge
from lora_edge.bundle.bundle import hash_file, load_bundle
from tests.support.adapters import make_adapter, make_all_linear
from tests.support.examples import examples
from tests.support.families import SUPPORTED, make_base

IDS = np.random.default_rng(0).integers(0, 256, (2, 11))

# ci/families and ci/long export all of them, in both forms.
_SOME = ("gemma2", "gpt_neox")


def test_published_bundle_is_whole_and_proved(exported: Path) -> None:
    bundle = lora_edge.load_bundle(exported)
    bundle.verify_all()
    assert all(entry.proved for entry in bundle.manifest.adapters.values())
    onnx.checker.check_model(str(bundle.directory / "onnx/model.onnx"))
    size = sum(file.stat().st_size for file in (exported / "parity").iterdir())
    assert size <= 1 << 20
    assert not list(exported.parent.glob(".*partial"))


def test_validates_against_pytorch_and_goldens(exported: Path, base: Path) -> None:
    live = lora_edge.validate(exported, reference=base)
    recorded = lora_edge.validate(exported)
    assert live.passed, live.table()
    assert recorded.passed, recorded.table()
    for case in live.cases:
        if case.figures is not None:
            assert case.figures.logit_error <= 1e-4
            assert case.figures.effect_error <= 1e-4
            assert case.figures.token_differences == 0
    controlled = [case for case in live.cases if case.controls]
    assert {case.adapters[0] for case in controlled} == {"plain", "rooted", "varied"}
    assert all(min(case.controls.values()) > 0.1 for case in controlled if case.controls)


def test_switched_off_equals_the_graph_without_branches(
    exported: Path, base: Path, tmp_path: Path
) -> None:
    lora_edge.export(base, {}, output=tmp_path / "bare", sites="adapters")
    bare, switchable = lora_edge.Runner(tmp_path / "bare"), lora_edge.Runner(exported)
    assert not bare.bundle.manifest.sites
    off = switchable.logits(IDS)
    np.testing.assert_array_equal(off, bare.logits(IDS))
    assert np.abs(switchable.logits(IDS, adapter="plain") - off).max() > 0.01
    pinned = lora_edge.Runner(exported, pinned=[None])
    np.testing.assert_array_equal(pinned.logits(IDS), off)


@pytest.mark.parametrize(
    ("name", "form"),
    examples(
        [(x, form) for x in ("plain", "rooted", "varied") for form in ("fused", "portable")],
        [("plain", "portable"), ("rooted", "fused"), ("varied", "fused")],
    ),
)
def test_merged_equals_switchable(
    name: str, form: str, exported: Path, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    lora_edge.export(base, {name: adapters[name]}, "merged", tmp_path / "m", form=form)  # type: ignore[arg-type]
    merged = lora_edge.Runner(tmp_path / "m").logits(IDS)
    runner = lora_edge.Runner(exported)
    np.testing.assert_allclose(merged, runner.logits(IDS, adapter=name), atol=1e-5)
    assert np.abs(merged - runner.logits(IDS)).max() > 0.01


def test_mixed_batch_gives_each_row_what_it_gives_alone(exported: Path) -> None:
    runner = lora_edge.Runner(exported)
    ids = np.random.default_rng(1).integers(0, 256, (8, 9))
    blend = {"plain": 0.7, "rooted": 0.3}
    states = ["plain", None, "rooted", blend, "varied", "rooted", None, "plain"]
    mixed = runner.logits(ids, adapter=states)
    for row, state in enumerate(states):
        alone = runner.logits(ids[row : row + 1], adapter=state)
        np.testing.assert_allclose(mixed[row], alone[0], atol=1e-5)
    assert np.abs(mixed[0] - runner.logits(ids[:1], adapter="rooted")[0]).max() > 0.01


def test_unseen_ranks_are_added_without_touching_the_graph(
    bundle: Path, base: Path, tmp_path: Path
) -> None:
    before = [hash_file(bundle / name) for name in ("onnx/model.onnx", "onnx/model.onnx_data")]
    for rank in (64, 3):
        path = make_adapter(
            base, tmp_path / f"r{rank}", rank, r=rank, lora_alpha=4, target_modules="all-linear"
        )
        lora_edge.add(bundle, {f"r{rank}": path})
    after = [hash_file(bundle / name) for name in ("onnx/model.onnx", "onnx/model.onnx_data")]
    assert before == after
    report = lora_edge.validate(bundle)
    assert not report.passed
    assert [case.adapters for case in report.failures] == [("r3",), ("r64",)]
    assert lora_edge.validate(bundle, reference=base).passed
    assert load_bundle(bundle).manifest.adapters["r64"].proved
    assert lora_edge.validate(bundle).passed


@pytest.mark.parametrize("form", examples(["fused", "portable"], ["fused"]))
@pytest.mark.parametrize(
    "family",
    examples(SUPPORTED, _SOME),
)
def test_every_family_exports_an_all_linear_adapter(
    family: str, form: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """`export` publishes nothing that differs from PyTorch, so returning is the proof.

    What is recorded makes the table of docs/families.md (`ci/families`).
    """
    record_property("family", family)
    record_property("form", form)
    base = make_base(family, tmp_path / "base")
    adapter = make_all_linear(family, base, tmp_path / "a")
    for mode in ("switchable", "merged"):
        bundle = lora_edge.export(base, {"a": adapter}, mode, tmp_path / mode, form=form)  # type: ignore[arg-type]
        assert bundle.manifest.adapters["a"].proved
        (report,) = (bundle.directory / "parity").glob("report-*.json")
        cases = json.loads(report.read_text())["cases"]
        figures = [case["figures"] for case in cases if case["figures"] and case["adapters"]]
        for figure in ("logit_error", "effect_error"):
            record_property(f"{mode} {figure}", max(each[figure] for each in figures))


def test_adapter_without_effect_is_not_published(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    dead = tmp_path / "dead"
    shutil.copytree(adapters["plain"], dead)
    file = dead / "adapter_model.safetensors"
    save_file({k: v * ("lora_B" not in k) for k, v in load_file(file).items()}, file)
    with pytest.raises(lora_edge.AdapterError, match=r"dead.*no effect") as caught:
        lora_edge.export(base, {"dead": dead}, output=tmp_path / "out")
    assert caught.value.exit_code == 2  # refused before the export begins
    assert {path.name for path in tmp_path.iterdir()} == {"dead"}


def test_adapter_of_another_base_is_refused(
    adapters: dict[str, Path], bundle: Path, tmp_path: Path
) -> None:
    other = make_base("llama", tmp_path / "other", hidden_size=96)
    with pytest.raises(lora_edge.AdapterError, match=r"64.*96"):
        lora_edge.export(other, {"a": adapters["plain"]}, output=tmp_path / "out")
    wrong = shutil.copytree(adapters["plain"], tmp_path / "wrong")
    (wrong / "training.json").write_text(json.dumps({"base_fingerprint": "0" * 64}))
    with pytest.raises(lora_edge.AdapterError, match="fingerprint"):
        lora_edge.add(bundle, {"wrong": wrong})
    assert not (tmp_path / "out").exists()
    assert not (bundle / "adapters" / "wrong").exists()


def test_site_that_the_graph_lacks_is_named(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    lora_edge.export(base, {"p": adapters["plain"]}, output=output, sites="adapters")
    with pytest.raises(lora_edge.AdapterError, match=r"model\.layers\.0\.mlp") as caught:
        lora_edge.add(output, {"rooted": adapters["rooted"]})
    assert "Export again" in caught.value.hint


def test_full_output_folder_is_refused_and_left_alone(base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(lora_edge.BundleError, match="not empty"):
        lora_edge.export(base, {}, output=tmp_path)
    with pytest.raises(lora_edge.BundleError):
        lora_edge.export(base, {}, output=tmp_path, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_base_is_loaded_twice(
    base: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the capture, which changes the model, and for the reference of all checks."""
    from lora_edge.base import model

    loaded: list[Path] = []
    original = model.load_whole

    def counted(base: Any, *args: Any, **options: Any) -> Any:
        loaded.append(base.directory)
        return original(base, *args, **options)

    monkeypatch.setattr(model, "load_whole", counted)
    lora_edge.export(base, {"p": adapters["plain"]}, output=tmp_path / "out")
    assert loaded == [base, base]


def test_a_bundle_of_version_1_runs_and_is_changed_to_version_2(
    bundle: Path, adapters: dict[str, Path]
) -> None:
    ids = [[5, 17, 90]]
    expected = {name: lora_edge.Runner(bundle).logits(ids, adapter=name) for name in adapters}
    file = bundle / "lora_edge.json"
    new = json.loads(file.read_text(encoding="utf-8"))
    part = new.pop("parts")["decoder"]
    cache = part["cache"]
    old = {
        **{name: value for name, value in new.items() if name != "beginning"},
        "format_version": 1,
        "sites": part["sites"],
        "graph": {
            **{x: part[x] for x in ("form", "backend", "padding", "vocab_size", "max_length")},
            **{x: cache[x] for x in ("layers", "kv_heads", "head_dim")},
            "head": part["head"],
            "shared_cache": cache["kind"] == "shared",
        },
    }
    file.write_text(json.dumps(old), encoding="utf-8")
    for name, logits in expected.items():
        found = lora_edge.Runner(bundle).logits(ids, adapter=name)
        np.testing.assert_array_equal(found, logits)
    lora_edge.add(bundle, {"again": adapters["plain"]})
    changed = json.loads(file.read_text(encoding="utf-8"))
    assert changed["format_version"] == 2
    assert changed["parts"]["decoder"]["sites"] == part["sites"]
    found = lora_edge.Runner(bundle).logits(ids, adapter="again")
    np.testing.assert_array_equal(found, expected["plain"])
