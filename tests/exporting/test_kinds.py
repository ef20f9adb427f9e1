"""Every kind of adapter, in both modes, against PEFT's unmerged forward and without its feature."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import lora_edge
from lora_edge.bundle.onnx_adapter import read_adapter
from lora_edge.parity.record.golden import Golden, recorded
from tests.support.examples import examples
from tests.support.kinds import BASES, ROWS, carries_feature, make_kinds

IDS = np.random.default_rng(3).integers(0, 256, (2, 12))
IDS[:, 4:7] = (7, 9, 11)
IDS[1, 8:12] = (3, 5, 6, 8)


@dataclasses.dataclass(frozen=True)
class Exported:
    """One base, its adapters, and the switchable bundle of all of them."""

    base: Path
    adapters: dict[str, Path]
    bundle: Path
    report: lora_edge.Report
    runner: lora_edge.Runner
    goldens: dict[str, Golden]


@pytest.fixture(scope="session")
def kinds_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    @functools.cache
    def export(key: str) -> Exported:
        root = tmp_path_factory.mktemp(key)
        names = [name for name, row in ROWS.items() if row.base == key]
        base, adapters = make_kinds(key, root, names)
        form = "portable" if key == "gemma3" else "fused"
        lora_edge.export(base, adapters, output=root / "out", form=form)  # type: ignore[arg-type]
        runner = lora_edge.Runner(root / "out")
        goldens = {
            golden.probe.adapters[0]: golden
            for golden in recorded(runner.bundle)
            if golden.probe.kind == "adapter"
        }
        report = lora_edge.validate(root / "out")
        return Exported(base, adapters, root / "out", report, runner, goldens)

    return export


@pytest.mark.parametrize("name", ROWS)
def test_switchable(name: str, kinds_of: Callable[[str], Exported]) -> None:
    """The export proved it; here: its effect, and the proof notices when the feature is gone."""
    row = ROWS[name]
    found = kinds_of(row.base)
    case = next(case for case in found.report.cases if case.name == f"adapter {name}")
    assert case.status == "passed", case.reason
    assert case.figures is not None
    assert case.limits is not None
    assert case.figures.effect_error <= 1e-4
    assert case.figures.effect_max > 0.1
    own = read_adapter(found.bundle / "adapters" / name / "adapter.onnx_adapter")
    dropped = {key: value * (not carries_feature(row, key)) for key, value in own.items()}
    assert any(carries_feature(row, key) and own[key].any() for key in own)
    whole = found.runner.logits(IDS, adapter=name)
    found.runner.override(name, dropped)
    try:
        without = found.runner.logits(IDS, adapter=name)
    finally:
        found.runner.override(name, None)
    # A proof whose limit is above what the feature does would not notice that it is gone.
    assert np.abs(whole - without).max() > 100 * case.limits.logit


_MERGED = [name for name, row in ROWS.items() if row.merged]


@pytest.mark.parametrize(
    "name",
    examples(_MERGED, _MERGED[::5]),
)
def test_merged(name: str, kinds_of: Callable[[str], Exported], tmp_path: Path) -> None:
    """The export proves the merged graph against PEFT's unmerged forward; here against ours."""
    found = kinds_of(ROWS[name].base)
    form = "portable" if name in ("tokens", "bias-all") else "fused"
    lora_edge.export(
        found.base, {name: found.adapters[name]}, "merged", tmp_path / "out", form=form
    )
    merged = lora_edge.Runner(tmp_path / "out").logits(IDS)
    np.testing.assert_allclose(merged, found.runner.logits(IDS, adapter=name), atol=3e-5)
    assert np.abs(merged - found.runner.logits(IDS)).max() > 0.01


@pytest.mark.parametrize("key", BASES)
def test_all_kinds_share_one_graph_and_mix_by_row(
    key: str, kinds_of: Callable[[str], Exported]
) -> None:
    found = kinds_of(key)
    assert found.report.passed, found.report.table()
    names = [name for name, row in ROWS.items() if row.base == key]
    states = [*names, None]
    ids = np.repeat(IDS[1:], len(states), axis=0)
    ids[:, 4:7] = (7, 9, 11)
    mixed = found.runner.logits(ids, adapter=states)
    for index, state in enumerate(states):
        alone = found.runner.logits(ids[:1], adapter=state)[0]
        np.testing.assert_allclose(mixed[index], alone, atol=1e-5)
    for one in range(len(states)):
        for other in range(one):
            assert np.abs(mixed[one] - mixed[other]).max() > 1e-3, (states[one], states[other])


@pytest.mark.parametrize("name", ["dora", "alora"])
def test_what_cannot_be_blended_is_refused_by_name(
    name: str, kinds_of: Callable[[str], Exported]
) -> None:
    runner = kinds_of("llama").runner
    for blend in ({name: 0.5}, {name: 1.0, "plain": 1.0}):
        with pytest.raises(lora_edge.DataError, match=f"{name}.*cannot be blended") as caught:
            runner.logits(IDS, adapter=blend)
        assert "alone" in caught.value.hint
    assert runner.logits(IDS, adapter={name: 1.0, "plain": 0.0}).any()


def test_added_adapters_of_every_kind(kinds_of: Callable[[str], Exported], tmp_path: Path) -> None:
    """A graph that was exported for kinds takes adapters that it has never seen."""
    found = kinds_of("llama")
    output = tmp_path / "out"
    kinds = ("lora", "dora", "bias", "norm", "embedding")
    lora_edge.export(found.base, {}, output=output, kinds=kinds)
    names = ("plain", "dora", "lora-bias", "saved-norms", "embedding", "alora")
    with pytest.raises(lora_edge.AdapterError, match=r"dora.*without the base") as caught:
        lora_edge.add(output, {"dora": found.adapters["dora"]})
    assert "--base" in caught.value.hint
    lora_edge.add(output, {name: found.adapters[name] for name in names}, base=found.base)
    report = lora_edge.validate(output, reference=found.base)
    assert report.passed, report.table()
    with pytest.raises(lora_edge.AdapterError, match=r"needs lora at lm_head") as caught:
        lora_edge.add(output, {"head": found.adapters["saved-head"]}, base=found.base)
    assert "Export again" in caught.value.hint


def test_add_names_the_missing_kind(kinds_of: Callable[[str], Exported], tmp_path: Path) -> None:
    found = kinds_of("llama")
    output = tmp_path / "out"
    lora_edge.export(found.base, {}, output=output)
    for name, kind in (("dora", "dora"), ("lora-bias", "bias"), ("saved-norms", "norm")):
        with pytest.raises(lora_edge.AdapterError, match=f"needs {kind} at") as caught:
            lora_edge.add(output, {name: found.adapters[name]}, base=found.base)
        assert "--kinds" in caught.value.hint
    assert not (output / "adapters" / "dora").exists()


def test_a_saved_copy_of_the_base_that_differs_is_refused(
    kinds_of: Callable[[str], Exported], tmp_path: Path
) -> None:
    """PEFT writes such a copy over the base, for every adapter."""
    from safetensors.numpy import load_file, save_file

    found = kinds_of("llama")
    wrong = Path(shutil.copytree(found.adapters["embedding"], tmp_path / "wrong"))
    file = wrong / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("base_layer.weight"))
    save_file(tensors | {key: tensors[key] + np.float32(0.01)}, file)
    with pytest.raises(lora_edge.UnsupportedAdapterError, match=r"embed_tokens\.weight.*differs"):
        lora_edge.export(found.base, {"wrong": wrong}, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
