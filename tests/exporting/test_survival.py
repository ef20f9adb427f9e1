"""A merged adapter in weights of few bits: what is proved, what is measured, what is refused."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import lora_edge
from lora_edge.adapter.load import load_adapter
from lora_edge.base.checkpoint import resolve_base
from lora_edge.base.layers import built_layers
from lora_edge.bundle.bundle import Bundle, load_bundle
from lora_edge.cli import main
from lora_edge.exporting.survival import Merging, rounded_after_merge
from lora_edge.fit.changes import parameter_changes
from lora_edge.maths.quantization import Quantization
from lora_edge.maths.survival import Effect, Survival
from lora_edge.names import packed_paths
from lora_edge.reports import html, junit, load_report, markdown
from lora_edge.tasks.task import TEXT
from tests.support.examples import examples
from tests.support.failing import with_graph
from tests.support.kinds import make_kinds
from tests.support.shipped import ADAPTERS, BASE

LAYERS = {"echo": 21, "mirror": 21, "shout": 6}
Export = Callable[..., Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Of the shipped base and one shipped adapter, made once; not to be changed."""

    @functools.cache
    def make(name: str, precision: str, keep_high: str | None, floor: float | None = None) -> Path:
        output = tmp_path_factory.mktemp(name) / "out"
        lora_edge.export(
            BASE,
            {name: ADAPTERS[name]},
            "merged",
            output,
            precision=precision,  # type: ignore[arg-type]
            keep_high=keep_high,  # type: ignore[arg-type]
            min_effect=floor,
        )
        return output

    return make


@pytest.fixture
def weak(tmp_path: Path) -> Path:
    """An adapter that does a tenth of what mirror does, in the same directions."""
    folder = Path(shutil.copytree(ADAPTERS["mirror"], tmp_path / "in" / "weak"))
    config = json.loads((folder / "adapter_config.json").read_text())
    config["lora_alpha"] /= 10
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _survival(bundle: Path) -> Survival:
    found = load_bundle(bundle).manifest.survival
    assert found is not None
    return found


def _coded(bundle: Path) -> dict[str, int]:
    """Layer -> bits of its codes, in the graph."""
    model = onnx.load(str(bundle / "onnx" / "model.onnx"), load_external_data=False)
    return {
        path: next(x.i for x in node.attribute if x.name == "bits")
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
        for path in packed_paths(node.name)
    }


def _bytes(bundle: Path) -> int:
    return (bundle / "onnx" / "model.onnx_data").stat().st_size


CASES = examples(
    itertools.product(("echo", "mirror", "shout"), ("int4", "int8")),
    [("mirror", "int4")],
)


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_none_rounds_every_layer_and_is_proved(name: str, precision: str, exported: Export) -> None:
    bundle = exported(name, precision, "none")
    manifest = load_bundle(bundle).manifest
    assert manifest.quantization is not None
    assert manifest.quantization.merged_first
    bits = {"int4": 4, "int8": 8}[precision]
    coded = _coded(bundle)
    assert {bits for path, bits in coded.items() if path != "lm_head"} == {bits}
    assert len(coded) == 22
    found = manifest.survival
    assert found is not None
    assert (found.keep_high, found.floor, found.high) == ("none", 0.9, {})
    assert len(found.layers) == LAYERS[name]
    assert 0.9 <= found.effect.retained < 1
    for layer in found.layers.values():
        assert 0.05 < layer.codes < 1
        assert 0.25 < layer.cosine < 1
    # What is proved is PyTorch with Q(W + ΔW), to float noise, whatever survives.
    report = lora_edge.validate(bundle)
    assert report.passed, report.table()
    case = next(case for case in report.cases if case.name == f"adapter {name}")
    assert case.figures is not None
    assert case.figures.effect_error < 1e-5
    assert abs(1 - case.figures.gain) < 1e-4
    assert case.figures.effect_max > 1


def test_int8_keeps_more_than_int4(exported: Export) -> None:
    four, eight = (_survival(exported("shout", x, "none")) for x in ("int4", "int8"))
    assert eight.effect.error < four.effect.error / 5
    for path, layer in four.layers.items():
        assert eight.layers[path].codes > layer.codes
        assert eight.layers[path].cosine > layer.cosine
        assert eight.layers[path].error < layer.error / 5


def test_touched_is_what_it_was_and_the_default(exported: Export) -> None:
    bundle, default = exported("shout", "int4", "touched"), exported("shout", "int4", None)
    manifest = load_bundle(bundle).manifest
    assert manifest.survival is None
    assert manifest.quantization is not None
    assert not manifest.quantization.merged_first
    assert manifest.quantization == load_bundle(default).manifest.quantization
    data = [(x / "onnx" / "model.onnx_data").read_bytes() for x in (bundle, default)]
    assert data[0] == data[1]
    assert len(_coded(bundle)) == 22 - LAYERS["shout"]
    # It is the switchable bundle's sum; rounded together it is another model.
    ids = np.random.default_rng(3).integers(0, 256, (2, 10))
    floats = lora_edge.Runner(bundle, exact=True).logits(ids)
    rounded = lora_edge.Runner(exported("shout", "int4", "none"), exact=True).logits(ids)
    assert np.abs(floats - rounded).max() > 0.05
    assert _bytes(exported("shout", "int4", "none")) < _bytes(bundle) / 1.5


def test_auto_is_none_where_that_is_enough(exported: Export) -> None:
    none, auto = exported("shout", "int4", "none"), exported("shout", "int4", "auto")
    assert _survival(auto).high == {}
    data = [(x / "onnx" / "model.onnx_data").read_bytes() for x in (none, auto)]
    assert data[0] == data[1]


def test_auto_keeps_some_layers_at_eight_bits(exported: Export) -> None:
    bundle = exported("mirror", "int4", "auto", 0.95)
    found, plain = _survival(bundle), _survival(exported("mirror", "int4", "none"))
    assert found.effect.retained >= 0.95 > plain.effect.retained
    assert 0 < len(found.high) < LAYERS["mirror"]
    assert set(found.high.values()) == {8}
    coded = _coded(bundle)
    assert {path for path, bits in coded.items() if bits == 8} == {*found.high, "lm_head"}
    # Those whose change was realised worst, and it is realised better now.
    worst = sorted(plain.layers, key=lambda path: plain.layers[path].cosine)
    assert set(found.high) == set(worst[: len(found.high)])
    for path in found.high:
        assert found.layers[path].cosine > plain.layers[path].cosine
    assert _bytes(exported("mirror", "int4", "none")) < _bytes(bundle)
    report = lora_edge.validate(bundle, reference=BASE, depth="quick")
    assert report.passed, report.table()


def test_auto_keeps_layers_in_fp32_where_eight_bits_are_too_few(
    exported: Export, weak: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    lora_edge.export(
        BASE,
        {"weak": weak},
        "merged",
        output,
        precision="int4",
        keep_high="auto",
        min_effect=0.95,
    )
    found = _survival(output)
    assert found.effect.retained >= 0.95
    assert set(found.high.values()) == {8, 32}
    floats = {path for path, bits in found.high.items() if bits == 32}
    assert not floats & set(_coded(output))
    assert not floats & set(found.layers)
    assert _bytes(exported("mirror", "int4", "none")) < _bytes(output)
    report = lora_edge.validate(output, reference=BASE, depth="quick")
    assert report.passed, report.table()


def _cli(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert isinstance(stopped.value.code, int)
    return (stopped.value.code, *capsys.readouterr())


def test_a_lost_effect_is_refused_in_one_line(
    weak: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("export", BASE, "-a", f"weak={weak}", "--mode", "merged", "--precision", "int4")
    own = (*own, "--keep-high", "none", "-o", tmp_path / "out")
    code, out, err = _cli(capsys, *own)
    assert (code, out) == (1, "")
    (error,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "adapter weak: merged and rounded to 4 bits" in error
    assert "90.0% is the least" in error
    (hint,) = [line for line in err.splitlines() if line.startswith("hint:")]
    assert "Nothing was published" in hint
    assert "--keep-high auto" in hint
    assert "--mode switchable" in hint
    assert not (tmp_path / "out").exists()
    # The control: the same export with a floor that it is above.
    assert _cli(capsys, *own, "--min-effect", "0.5")[0] == 0
    found = _survival(tmp_path / "out")
    assert 0.5 < found.effect.retained < 0.9
    assert found.floor == 0.5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"keep_high": "auto", "precision": "int4"}, "keep_high.*merged"),
        ({"keep_high": "none", "mode": "merged"}, "keep_high.*few bits"),
        ({"keep_high": "touched"}, "keep_high"),
        ({"keep_high": "all", "mode": "merged", "precision": "int4"}, "keep_high.*'all'"),
        ({"min_effect": 0.5, "mode": "merged", "precision": "int4"}, "min_effect"),
        (
            {"keep_high": "touched", "min_effect": 0.5, "mode": "merged", "precision": "int4"},
            "min_effect",
        ),
        (
            {"keep_high": "auto", "min_effect": 1.5, "mode": "merged", "precision": "int4"},
            "min_effect is 1.5, expected 0 to 1",
        ),
        (
            {"keep_high": "auto", "min_effect": True, "mode": "merged", "precision": "int4"},
            "min_effect is True",
        ),
    ],
)
def test_options_that_have_no_meaning_are_refused(
    options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(lora_edge.OptionError, match=named):
        lora_edge.export(BASE, {"shout": ADAPTERS["shout"]}, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_command_line_refuses_them_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("export", BASE, "-a", f"shout={ADAPTERS['shout']}", "-o", tmp_path / "out")
    code, _, err = _cli(capsys, *own, "--keep-high", "auto")
    assert code == 2
    assert "--mode merged" in err
    assert _cli(capsys, *own, "--keep-high", "some")[0] == 2
    assert not (tmp_path / "out").exists()


def _of_the_base(good: Path, output: Path, path: str) -> Bundle:
    """A copy whose layer has the codes of Q(W), not of Q(W + ΔW): the adapter is not in it."""
    quantization = load_bundle(good).manifest.quantization
    assert quantization is not None
    weight = resolve_base(BASE).parameter(f"{path}.weight")
    assert weight is not None
    packed = quantization.blocks(path, weight).packed()
    sizes = {
        x: layer.out_features for x, layer in built_layers(resolve_base(BASE), TEXT).modules.items()
    }

    def exchange(model: ir.Model) -> None:
        (name,) = {
            x.removesuffix(".weight.codes")
            for x in model.graph.initializers
            if x.endswith(".codes") and path in packed_paths(x.removesuffix(".weight.codes"))
        }
        paths = packed_paths(name)
        start = sum(sizes[x] for x in paths[: paths.index(path)])
        for part, values in packed.items():
            own = f"{name}.weight.{part}"
            before = model.graph.initializers[own].const_value
            assert before is not None
            after = before.numpy().copy()
            rows = after.reshape(sum(sizes[x] for x in paths), -1)
            rows[start : start + sizes[path]] = values.reshape(sizes[path], -1)
            model.graph.initializers[own].const_value = ir.tensor(after, name=own)

    return with_graph(good, output, exchange)


def test_codes_without_the_adapter_are_caught(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "good"
    lora_edge.export(
        BASE,
        {"shout": ADAPTERS["shout"]},
        "merged",
        good,
        precision="int4",
        keep_high="none",
        activations="fp32",
    )
    path = next(iter(_survival(good).layers))
    bad = _of_the_base(good, tmp_path / "bad", path).directory
    report = lora_edge.validate(bad, reference=BASE, depth="quick")
    assert not report.exact
    assert {"adapter", "weights"} <= {case.kind for case in report.failures}
    (weights,) = [case for case in report.failures if case.name == "weights"]
    assert f"{path}.weight (codes)" in weights.reason
    assert not load_bundle(bad).adapter("shout").proved
    assert not lora_edge.validate(bad).passed  # against the golden cases, without PyTorch
    for command in (("validate", good), ("validate", good, "--reference", BASE, "--quick")):
        assert _cli(capsys, *command)[0] == 0
    assert _cli(capsys, "validate", bad, "--reference", BASE, "--quick")[0] == 1


def test_an_export_of_codes_without_the_adapter_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_edge import graph

    right = graph.quantize_layers

    def forgets(*arguments: Any) -> None:
        right(*arguments[:4])

    monkeypatch.setattr(graph, "quantize_layers", forgets)
    with pytest.raises(lora_edge.ParityError, match="not proved"):
        lora_edge.export(
            BASE,
            {"shout": ADAPTERS["shout"]},
            "merged",
            tmp_path / "out",
            precision="int4",
            keep_high="none",
        )
    assert not (tmp_path / "out").exists()


def test_survival_is_shown_apart_from_the_proof(
    exported: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = exported("shout", "int4", "none")
    share = f"{_survival(bundle).effect.retained:.1%} of the adapter's effect is retained"
    assert share in (bundle / "README.md").read_text(encoding="utf-8")
    _, out, _ = _cli(capsys, "inspect", bundle)
    assert share in " ".join(out.split())
    assert "--keep-high none" in " ".join(out.split())
    report = lora_edge.validate(bundle, depth="quick")
    assert share in report.table().splitlines()[-1]
    (tmp_path / "r.json").write_text(report.to_json())
    data = load_report(tmp_path / "r.json")
    assert share in data["survival"]
    assert 'id="survival"' in html(data)
    assert "of the adapter's effect is retained" in markdown(data)
    assert 'name="survival"' in junit(data)
    assert not any("survival" in case.name for case in report.cases)
    # Of others there is none.
    plain = lora_edge.validate(exported("shout", "int4", "touched"), depth="quick")
    assert plain.survival == ""
    assert 'id="survival"' not in html(plain.to_data())


KINDS = {
    "llama": (
        "lora-bias",
        "dora",
        "saved-linear",
        "embedding",
        "embedding-and-head",
        "tokens",
        "saved-head",
    ),
    "qwen2": ("bias-and-dora",),
    "gpt2": ("conv1d-dora",),
}
_SHORT = {"lora-bias", "embedding-and-head", "tokens", "conv1d-dora"}


@pytest.mark.parametrize(
    ("key", "name"),
    examples(
        [(key, name) for key, names in KINDS.items() for name in names],
        lambda row: row[1] in _SHORT,
    ),
)
def test_every_kind_is_merged_before_it_is_rounded(key: str, name: str, tmp_path: Path) -> None:
    base, adapters = make_kinds(key, tmp_path, [name])
    output = tmp_path / "out"
    lora_edge.export(
        base,
        adapters,
        "merged",
        output,
        precision="int4",
        keep_high="none",
        min_effect=0.8,
        activations="fp32",
    )
    report = lora_edge.validate(output)
    assert report.passed, report.table()
    (case,) = [case for case in report.cases if case.name == f"adapter {name}"]
    assert case.figures is not None
    assert case.figures.effect_error < 1e-4
    assert case.figures.effect_max > 0.1
    quantization = load_bundle(output).manifest.quantization
    assert quantization is not None
    coded = {path for path in quantization.layers if "embed" not in path and "wte" not in path}
    assert set(_coded(output)) == coded  # no layer is left in floats


def _merging() -> tuple[Merging, Quantization]:
    base = resolve_base(BASE)
    built = built_layers(base, TEXT)
    adapter = load_adapter(ADAPTERS["shout"], "shout").settled(built.modules)
    changes = parameter_changes(adapter, built.modules, built.tied)
    linear = tuple(path for path, layer in built.modules.items() if layer.kind == "linear")
    rounded = Quantization(4, 32, (*linear, "model.embed_tokens"))
    return Merging(changes, built.modules, built.tied, base.parameter), rounded


def _said(layers: int, each: Mapping[int, float]) -> Callable[[Quantization], Effect]:
    """An effect that is so large at first (0), and grows with each layer at 8 bits or in floats."""

    def effect(made: Quantization) -> Effect:
        eight, floats = len(made.bits_of), layers - len(made.layers)
        return Effect(each[0] + each[8] * eight + each[32] * floats, 1.0, 0.0)

    return effect


@pytest.mark.parametrize(
    ("each", "floor", "eight", "floats"),
    [
        ({0: 0.95, 8: 0.0, 32: 0.0}, 0.9, 0, 0),
        ({0: 0.5, 8: 0.1, 32: 0.0}, 0.79, 3, 0),
        ({0: 0.5, 8: 0.1, 32: 0.0}, 0.59, 1, 0),
        ({0: 0.5, 8: 0.05, 32: 0.1}, 0.89, 4, 2),  # 0.5 + 4 * 0.05 + 2 * 0.1
    ],
)
def test_auto_takes_the_fewest_layers(
    each: Mapping[int, float], floor: float, eight: int, floats: int
) -> None:
    merging, rounded = _merging()
    effect = _said(len(rounded.layers), each)
    made, found = rounded_after_merge(rounded, merging, effect, "auto", floor, "shout", print)
    assert sorted(found.high.values()) == [8] * eight + [32] * floats
    assert made.merged_first
    assert {x: bits for x, bits in found.high.items() if bits == 8} == made.bits_of
    assert set(rounded.layers) - set(made.layers) == {x for x, b in found.high.items() if b == 32}
    assert (made.mean_error > 0) == bool(found.high)  # of the base as it is rounded now
    order = sorted(merging.measured(rounded), key=lambda x: merging.measured(rounded)[x].cosine)
    assert set(found.high) == set(order[: eight + floats])


def test_auto_says_so_where_nothing_helps() -> None:
    merging, rounded = _merging()
    effect = _said(len(rounded.layers), {0: 0.5, 8: 0.0, 32: 0.0})
    with pytest.raises(lora_edge.ParityError, match=r"50\.0%.*90\.0%") as caught:
        rounded_after_merge(rounded, merging, effect, "auto", 0.9, "shout", print)
    assert "--keep-high" not in caught.value.hint
    assert "--mode switchable" in caught.value.hint


def test_layers_that_share_a_weight_are_raised_together() -> None:
    merging, rounded = _merging()
    tied = ("model.embed_tokens", "lm_head")
    assert all(len(group) == 1 for group in merging.groups(rounded))
    changes = {**merging.changes, "lm_head.weight": lambda weight: 2 * weight}
    both = Merging(changes, merging.modules, tied, merging.weights)  # type: ignore[arg-type]
    assert both.groups(rounded)[-1] == tied
    found = both.measured(rounded)["lm_head"]  # Q(2 W) - Q(W) is Q(W), and ΔW is W
    assert found.codes == 0
    assert found.cosine == pytest.approx(0.997, abs=0.002)
    assert found.error == pytest.approx(0.078, abs=0.01)
