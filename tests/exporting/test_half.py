"""Bases in float16: every kind of adapter on every form, proved in float32 and measured beside."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import lora_edge
from lora_edge.bundle.bundle import load_bundle
from lora_edge.bundle.onnx_adapter import read_adapter
from lora_edge.names import parse_lora_input
from lora_edge.parity.drift import HALF_LIMITS
from lora_edge.parity.report import Report
from lora_edge.runtime.pool import take_buffers
from tests.exporting.test_quantized_encoders import ROWS
from tests.support.commands import exit_code
from tests.support.encoders import make_encoder, make_encoder_adapter
from tests.support.exactness import exact_case
from tests.support.examples import examples
from tests.support.failing import signed
from tests.support.families import make_base
from tests.support.kinds import Made, make_kinds
from tests.support.paths import MODELS
from tests.support.saving import load_model

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
IDS = np.random.default_rng(5).integers(0, 256, (2, 12))
KINDS = {
    "llama": (
        "plain", "dora", "lora-bias", "saved-linear", "embedding", "alora", "embedding-and-head",
        "tokens", "saved-head", "saved-norms",
    ),
    "qwen2": ("bias-and-dora", "tokens-untied"),
    "gpt2": ("conv1d-dora", "layernorm", "positions"),
    "gemma3": ("offset-norm", "scaled-embedding"),
}  # fmt: skip
FORMS = [
    ("llama", "fused"),
    ("gpt2", "portable"),
    pytest.param("qwen2", "fused", marks=pytest.mark.long),
    pytest.param("gpt2", "fused", marks=pytest.mark.long),
    pytest.param("gemma3", "fused", marks=pytest.mark.long),
    pytest.param("llama", "portable", marks=pytest.mark.long),
]
MERGED = [(key, name) for key, names in KINDS.items() for name in names if name != "alora"]
_SHORT = {"dora", "embedding-and-head"}
_encoders = pytest.mark.skipif(
    transformers.__version__ < "5", reason="the small encoders are made with transformers 5"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    @functools.cache
    def make(key: str, form: Any = "fused") -> Made:
        root = tmp_path_factory.mktemp(key)
        base, adapters = make_kinds(key, root, KINDS[key])
        output = root / "bundle"
        lora_edge.export(base, adapters, output=output, precision="fp16", form=form)
        return Made(base, adapters, output)

    return make


def _types(graph: Path) -> dict[str, int]:
    """dtype of every input, output and constant of a graph."""
    model = onnx.load(str(graph), load_external_data=False)
    values = (*model.graph.input, *model.graph.output)
    return {
        **{value.name: value.type.tensor_type.elem_type for value in values},
        **{tensor.name: tensor.data_type for tensor in model.graph.initializer},
    }


def _near(report: Report) -> None:
    """float16 adds something to each case of drift, and little."""
    assert report.passed, report.table()
    for case in report.drift:
        assert case.drift is not None
        assert case.drift.logit_error > 0
        assert 1e-5 < case.drift.effect_error < 0.02
        if not np.isnan(case.drift.kl):
            assert case.drift.kl < case.drift.kl_limit == HALF_LIMITS.kl


@pytest.mark.parametrize(("key", "form"), FORMS)
def test_every_kind_is_exact_in_float32_and_near_in_float16(
    key: str, form: str, made: Callable[..., Made]
) -> None:
    report = lora_edge.validate(made(key, form).bundle)
    for name in KINDS[key]:
        exact_case(report, name, 0.1)
    assert {case.adapters for case in report.drift} == {(), *((name,) for name in KINDS[key])}
    _near(report)
    assert "float16 against float32" in report.table()


@pytest.mark.parametrize(
    ("key", "name"),
    examples(MERGED, lambda row: row[1] in _SHORT),
)
def test_a_merged_adapter_is_rounded_with_the_base(
    key: str, name: str, made: Callable[..., Made], tmp_path: Path
) -> None:
    found = made(key)
    lora_edge.export(
        found.base, {name: found.adapters[name]}, "merged", tmp_path / "out", precision="fp16"
    )
    report = lora_edge.validate(tmp_path / "out")
    _near(report)
    exact_case(report, name, 0.1)
    merged = lora_edge.Runner(tmp_path / "out", exact=True).logits(IDS)
    switchable = lora_edge.Runner(found.bundle, exact=True)
    effect = switchable.logits(IDS, adapter=name) - switchable.logits(IDS)
    apart = np.linalg.norm(merged - switchable.logits(IDS, adapter=name))
    assert 1e-6 < apart / np.linalg.norm(effect) < 0.05  # two roundings of two sums
    survival = load_bundle(tmp_path / "out").manifest.survival
    assert survival is not None
    assert 1e-6 < survival.effect.error < 0.05
    assert survival.effect.retained > 0.99


@_encoders
@pytest.mark.parametrize(
    ("key", "mode"),
    examples(
        [(key, mode) for key in ROWS for mode in ("switchable", "merged")],
        [("images", "switchable"), ("texts", "merged")],
    ),
)
def test_models_without_a_cache(key: str, mode: Any, tmp_path: Path) -> None:
    row = ROWS[key]
    base = make_encoder(row.family, row.task, tmp_path / "base")
    adapters = {
        name: make_encoder_adapter(base, row.task, tmp_path / name, labels, **settings)
        for name, (labels, settings) in list(row.adapters.items())[
            : None if mode != "merged" else 1
        ]
    }
    output = tmp_path / "out"
    lora_edge.export(base, adapters, mode, output, task=row.task, precision="fp16")
    report = lora_edge.validate(output)
    _near(report)
    for name in adapters:
        exact_case(report, name, 1e-3)
    types = _types(output / "onnx" / "model.onnx")
    part = load_bundle(output).manifest.parts["encoder"]
    floats = {types[x] for x in (*part.inputs, str(part.output))} - {onnx.TensorProto.INT64}
    assert floats == {FLOAT}


def test_what_is_float16(made: Callable[..., Made]) -> None:
    """Weights, adapter inputs and cache; logits are float32, and so is all of the exact graph."""
    found = made("llama")
    bundle = load_bundle(found.bundle)
    part = bundle.manifest.parts["decoder"]
    assert (bundle.manifest.precision, part.file) == ("fp16", "onnx/model.onnx")
    assert part.exact == "onnx/exact.onnx"
    for file in ("model", "base", "single", "rows", "exact"):
        path = found.bundle / "onnx" / f"{file}.onnx"
        if file == "rows" and not path.is_file():
            continue
        types = _types(path)
        own = HALF if file != "exact" else FLOAT
        assert types["logits"] == FLOAT
        assert types["present.1.value"] == types["past_key_values.0.key"] == own
        assert {types[x] for x in types if parse_lora_input(x)} <= {own}
        assert types["model.layers.1.mlp.up_proj.weight"] == HALF
        assert types["model.embed_tokens.weight"] == HALF
    runner = lora_edge.Runner(found.bundle)
    assert runner.logits(IDS, adapter="plain").dtype == np.float32
    assert runner.decoder.cache_dtype == np.float16
    off = np.abs(runner.logits(IDS) - lora_edge.Runner(found.bundle, exact=True).logits(IDS)).max()
    assert 1e-6 < off < 0.05


def test_the_file_is_half_as_large(made: Callable[..., Made], tmp_path: Path) -> None:
    found = made("llama")
    lora_edge.export(found.base, {}, output=tmp_path / "out")
    sizes = [
        (path / "onnx" / "model.onnx_data").stat().st_size
        for path in (found.bundle, tmp_path / "out")
    ]
    assert 0.45 < sizes[0] / sizes[1] < 0.6  # the rotary's tables stay float32


def test_an_adapter_has_its_file_and_a_copy_in_float16(made: Callable[..., Made]) -> None:
    """ONNX Runtime takes the copy as it is, on the graph as it is."""
    found = made("llama")
    manifest = load_bundle(found.bundle).manifest
    for name, entry in manifest.adapters.items():
        assert (entry.file, entry.half) == (
            f"adapters/{name}/adapter.onnx_adapter",
            f"adapters/{name}/half.onnx_adapter",
        )
        own = read_adapter(found.bundle / entry.file)
        file = ort.AdapterFormat.read_adapter(str(found.bundle / entry.half))
        copy = {key: value.numpy() for key, value in file.get_parameters().items()}
        assert own.keys() == copy.keys()
        for key, tensor in own.items():
            assert copy[key].dtype == np.float16
            np.testing.assert_array_equal(tensor.astype(np.float16), copy[key])
    session = ort.InferenceSession(str(found.bundle / "onnx" / "base.onnx"))
    assert "lora" not in str([x.name for x in session.get_inputs()])


def test_rows_pinned_and_blends_agree(made: Callable[..., Made]) -> None:
    """Every way in which a batch can run, against one row alone."""
    found = made("llama")
    runner = lora_edge.Runner(found.bundle, pinned=["plain", None])
    rows = [list(map(int, row)) for row in (*IDS, IDS[0, ::-1])]
    mixed = runner.logits(rows, adapter=["plain", None, "dora"])
    for row, adapter, logits in zip(rows, ("plain", None, "dora"), mixed, strict=True):
        alone = runner.logits([row], adapter=adapter)[0]
        np.testing.assert_allclose(logits, alone, atol=0.02)
    exact = lora_edge.Runner(found.bundle, exact=True)
    blend = {"plain": 0.5, "lora-bias": -1.0}
    np.testing.assert_allclose(
        runner.logits(IDS, adapter=blend), exact.logits(IDS, adapter=blend), atol=0.02
    )
    assert np.abs(exact.logits(IDS, adapter=blend) - exact.logits(IDS)).max() > 0.1
    said = runner.generate_ids([rows[0][:4]], adapter="alora", max_new_tokens=4)
    assert [len(row) for row in said] == [4]


def test_no_place_behind_a_row_is_read(
    made: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GroupQueryAttention in float16 as in float32: buffers are used again without being zeroed."""
    runner = lora_edge.Runner(made("llama").bundle)
    rows = [[5, 9, 13, 7, 20, 31], [8, 2, 4]]

    def logits() -> np.ndarray:
        decoding = runner.start(["plain", None], 2, 40)
        return np.stack([decoding.prefill(rows), *(decoding.step([x, x + 1]) for x in range(5))])

    zeroed, filled = logits(), []

    def take(*arguments: Any) -> Any:
        buffers = take_buffers(*arguments)
        for array in buffers.arrays:
            assert array.dtype == np.float16
            array[...] = np.nan
            filled.append(array)
        return buffers

    monkeypatch.setattr("lora_edge.runtime.caches.take_buffers", take)
    np.testing.assert_array_equal(logits(), zeroed)
    assert filled


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    """Its experts stand in branches of the graph, which go on in float32."""
    base = make_base("mixtral", tmp_path / "base")
    lora_edge.export(base, {}, output=tmp_path / "out", precision="fp16")
    _near(lora_edge.validate(tmp_path / "out"))
    types = _types(tmp_path / "out" / "onnx" / "model.onnx")
    assert {types[name] for name in types if ".experts." in name and name.endswith("_proj")} == {
        HALF
    }


def test_adapters_are_added_and_removed(made: Callable[..., Made], tmp_path: Path) -> None:
    found, output = made("llama"), tmp_path / "out"
    lora_edge.export(found.base, {}, output=output, kinds=("lora", "dora"), precision="fp16")
    lora_edge.add(output, {"dora": found.adapters["dora"]}, found.base)
    report = lora_edge.validate(output, reference=found.base, depth="quick")
    _near(report)
    exact_case(report, "dora", 0.1)
    (case,) = [case for case in report.drift if case.adapters]
    assert case.drift is not None
    assert 0.1 < case.drift.largest < 1e4
    assert (output / "adapters" / "dora" / "half.onnx_adapter").is_file()
    lora_edge.remove(output, ["dora"])
    assert not any("dora" in file for file in load_bundle(output).manifest.files)


def _scaled(base: Path, output: Path, scale: float) -> Path:
    """The same function, with larger numbers between two layers of the MLP."""
    model = load_model(AutoModelForCausalLM, base)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight *= scale
            layer.mlp.down_proj.weight /= scale
    shutil.copytree(base, output)
    model.save_pretrained(output)
    return output


@pytest.mark.parametrize(
    ("factor", "error", "said"),
    [
        # The CPU computes activations in float32, so that its outputs do not tell.
        (3e5, lora_edge.ParityError, r"layers\.0.*overflows.*65504"),
        (1e8, lora_edge.BaseModelError, r"layers\.0\.mlp\.up_proj\.weight holds .*65504"),
    ],
    ids=["activations", "weights"],
)
def test_numbers_that_float16_cannot_hold_are_refused(
    factor: float, error: Any, said: str, made: Callable[..., Made], tmp_path: Path
) -> None:
    base = _scaled(made("llama").base, tmp_path / "base", factor)
    with pytest.raises(error, match=said) as caught:
        lora_edge.export(base, {}, output=tmp_path / "out", precision="fp16")
    assert "--precision fp32" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_float16_cannot_hold_is_refused(
    made: Callable[..., Made], tmp_path: Path
) -> None:
    found, adapter = made("llama"), tmp_path / "large"
    shutil.copytree(found.adapters["plain"], adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["lora_alpha"] = 1e7
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(lora_edge.AdapterError, match=r"adapter large .*\.B holds .*65504"):
        lora_edge.export(found.base, {"large": adapter}, output=tmp_path / "out", precision="fp16")
    assert not (tmp_path / "out").exists()
    with pytest.raises(lora_edge.AdapterError, match=r"adapter large .*\.B holds .*65504"):
        lora_edge.add(found.bundle, {"large": adapter})
    with pytest.raises(lora_edge.DataError, match="65504"):
        lora_edge.Runner(found.bundle).logits(IDS, adapter={"plain": 1e6})


@pytest.mark.parametrize(
    ("options", "named"),
    [({"backend": "optimum"}, "optimum"), ({"task": "text2text-generation"}, "text2text")],
)
def test_other_graphs_are_refused_by_name(
    options: dict[str, Any], named: str, made: Callable[..., Made], tmp_path: Path
) -> None:
    with pytest.raises(lora_edge.UnsupportedModelError, match=f"fp16.*{named}") as caught:
        lora_edge.export(
            made("llama").base, {}, output=tmp_path / "out", precision="fp16", **options
        )
    assert "--precision fp32" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", examples(["model", "exact"], ["model"]))
def test_a_changed_weight_and_a_changed_graph_are_found(
    file: str, made: Callable[..., Made], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(made("llama").bundle, output)
    path = output / "onnx" / f"{file}.onnx"
    model = onnx.load(str(path), load_external_data=False)
    node = next(x for x in model.graph.node if x.op_type == "SkipSimplifiedLayerNormalization")
    node.attribute[0].f *= 1.5
    onnx.save(model, str(path))
    (tensor,) = [
        x for x in model.graph.initializer if x.name == "model.layers.1.mlp.up_proj.weight"
    ]
    offset = next(int(x.value) for x in tensor.external_data if x.key == "offset")
    with (output / "onnx" / "model.onnx_data").open("r+b") as data:
        data.seek(offset)
        data.write(np.float16(0.75).tobytes())
    signed(output)
    report = lora_edge.validate(output, reference=made("llama").base, depth="quick")
    reasons = [case.reason for case in report.failures if case.kind == "weights"]
    assert any(
        "layers.1.mlp.up_proj.weight differs from the checkpoint's in 1 of" in x for x in reasons
    )
    assert any("are not one graph" in reason for reason in reasons)


def test_a_copy_of_another_adapter_is_found(made: Callable[..., Made], tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(made("llama").bundle, output)
    folder = output / "adapters"
    shutil.copyfile(folder / "none" / "half.onnx_adapter", folder / "plain" / "half.onnx_adapter")
    signed(output)
    report = lora_edge.validate(output, reference=made("llama").base, depth="quick")
    assert any("plain/half.onnx_adapter is no copy" in case.reason for case in report.failures)


def test_what_other_clients_are_told(made: Callable[..., Made]) -> None:
    told = json.loads((made("llama").bundle / "config.json").read_text())["transformers.js_config"]
    assert told == {
        "dtype": "fp32",  # of the file's name, which has no suffix
        "use_external_data_format": {"model.onnx": True},
        "kv_cache_dtype": "float16",
    }
    card = (made("llama").bundle / "README.md").read_text()
    assert "computes in float16" in card
    assert "half.onnx_adapter" in card


def test_the_shipped_model_at_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out")
    adapter = f"shout={MODELS / 'adapters' / 'shout'}"
    assert (
        exit_code(
            [
                "export",
                str(MODELS / "tiny-llama"),
                "-a",
                adapter,
                "-o",
                output,
                "--precision",
                "fp16",
            ]
        )
        == 0
    )
    assert "weights in float16" in capsys.readouterr().err
    for extra in ([], ["--exact"]):
        assert exit_code(["run", output, "-a", "shout", "-p", "Word: river Answer:", *extra]) == 0
        assert capsys.readouterr().out.strip() == "RIVER!"
    assert exit_code(["validate", output, "--quick"]) == 0
    assert "float16 against float32" in capsys.readouterr().out
    assert exit_code(["inspect", output]) == 0
    assert "fp16" in capsys.readouterr().out
