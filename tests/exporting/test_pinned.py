"""Pinned adapters: in the weights of a session of their own, and everything else as before."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_edge
from lora_edge.bundle.bundle import Manifest, load_bundle
from lora_edge.bundle.onnx_adapter import read_adapter
from lora_edge.bundle.part import SiteEntry, WeightEntry
from lora_edge.maths.lora import Factors, SiteChange
from lora_edge.runtime.pinned import merged_values
from tests.support.examples import examples
from tests.support.families import make_base
from tests.support.kinds import make_kinds

IDS = np.random.default_rng(3).integers(0, 256, (2, 12))
PROMPTS = [IDS[0, :9].tolist(), IDS[1, :4].tolist()]
LIMIT = 1e-5
FORMS = ["fused", "portable"]
LLAMA = (
    "patterns", "all-linear", "dora-rslora", "alora", "lora-bias", "saved-norms", "head",
    "embedding", "tokens-tied-head",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Made:
    base: Path
    adapters: dict[str, Path]
    bundles: dict[str, Path]


def _make(key: str, names: tuple[str, ...], forms: list[str], root: Path) -> Made:
    base, adapters = make_kinds(key, root, names)
    for form in forms:
        lora_edge.export(base, adapters, output=root / form, form=form)  # type: ignore[arg-type]
    return Made(base, adapters, {form: root / form for form in forms})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Its head and its embedding are tied."""
    return _make("llama", LLAMA, FORMS, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def copied(llama: Made, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """A bundle whose manifest a function has changed."""

    def copy(change: Callable[[dict[str, Any]], object]) -> Path:
        folder = tmp_path_factory.mktemp("copy") / "b"
        shutil.copytree(llama.bundles["fused"], folder)
        file = folder / "lora_edge.json"
        data = json.loads(file.read_text(encoding="utf-8"))
        change(data)
        file.write_text(json.dumps(data), encoding="utf-8")
        return folder

    return copy


def _differs(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name",
    examples(["patterns", "all-linear", "dora-rslora"], ["dora-rslora"]),
)
def test_pinned_is_the_switchable_graph_and_the_merged_one(
    name: str, form: str, llama: Made, tmp_path: Path
) -> None:
    bundle = llama.bundles[form]
    lora_edge.export(llama.base, {name: llama.adapters[name]}, "merged", tmp_path / "m", form=form)  # type: ignore[arg-type]
    pinned, plain = lora_edge.Runner(bundle, pinned=[name]), lora_edge.Runner(bundle)
    merged = lora_edge.Runner(tmp_path / "m")
    logits = pinned.logits(IDS, adapter=name)
    assert _differs(logits, plain.logits(IDS, adapter=name)) <= LIMIT
    assert _differs(logits, merged.logits(IDS)) <= LIMIT
    assert _differs(logits, plain.logits(IDS)) > 1e-2
    decoder, _ = pinned._session_for(name, 2)
    assert decoder is not pinned.decoder
    assert not {x for x in decoder.inputs if "lora" in x}
    ids = pinned.generate_ids(PROMPTS, name, 12)
    assert ids == plain.generate_ids(PROMPTS, name, 12) == merged.generate_ids(PROMPTS, None, 12)
    assert ids != plain.generate_ids(PROMPTS, None, 12)


@pytest.mark.parametrize("form", FORMS)
def test_a_pinned_session_with_the_factors_of_another_adapter_shows(form: str, llama: Made) -> None:
    runner = lora_edge.Runner(llama.bundles[form], pinned=["patterns"])
    own = lora_edge.Runner(llama.bundles[form]).logits(IDS, adapter="patterns")
    other = read_adapter(llama.bundles[form] / "adapters" / "all-linear" / "adapter.onnx_adapter")
    runner._active.override("patterns", other)  # before the session is opened
    assert _differs(runner.logits(IDS, adapter="patterns"), own) > 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_there_and_back_and_what_is_not_pinned(form: str, llama: Made) -> None:
    plain = lora_edge.Runner(llama.bundles[form])
    runner = lora_edge.Runner(llama.bundles[form], pinned=["patterns", None, "dora-rslora"])
    first = runner.logits(IDS, adapter="patterns")
    off = runner.logits(IDS)
    assert _differs(off, plain.logits(IDS)) <= LIMIT
    np.testing.assert_array_equal(runner.logits(IDS, adapter=["none", {}]), off)
    gained = runner.logits(IDS, adapter="dora-rslora")
    np.testing.assert_array_equal(runner.logits(IDS, adapter=["patterns"] * 2), first)
    np.testing.assert_array_equal(runner.logits(IDS, adapter={"patterns": 1.0}), first)
    assert min(_differs(first, off), _differs(gained, off), _differs(first, gained)) > 1e-2
    others: list[Any] = [
        {"patterns": 0.5},
        {"patterns": 1.0, "all-linear": -0.5},
        ["patterns", None],
        ["dora-rslora", "patterns"],
        "all-linear",
    ]
    for state in others:
        expected = plain.logits(IDS, adapter=state)
        np.testing.assert_array_equal(runner.logits(IDS, adapter=state), expected)
        assert runner.generate_ids(PROMPTS, state, 6) == plain.generate_ids(PROMPTS, state, 6)
        assert runner._session_for(state, 2)[0] is runner.decoder


def test_a_cache_belongs_to_the_adapter_in_the_weights(llama: Made) -> None:
    runner = lora_edge.Runner(llama.bundles["fused"], pinned=["patterns", None])
    decoder, binding = runner._session_for("patterns", 2)
    decoding = decoder.start(2, 16, binding)
    decoding.prefill(PROMPTS)
    assert decoding.binding.states == ((("patterns", 1.0),),)
    own = decoder.start(2, 16)  # this session's own state, not "off"
    assert own.binding.states == decoding.binding.states
    for other in ("all-linear", None, {"patterns": 0.5}):
        with pytest.raises(lora_edge.LoraEdgeError, match="weights hold") as caught:
            decoder.start(2, 16, runner.binding(other, 2))
        assert "Runner's decoder" in caught.value.hint
    off, nothing = runner._session_for(None, 2)
    assert off is not decoder
    assert off.start(2, 16, nothing).binding.states == ((),)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alora", "'alora' cannot be pinned: it is an activated LoRA"),
        ("lora-bias", "it changes the bias of model.layers.0.self_attn.q_proj"),
        ("saved-norms", "it changes the norm model.layers.0.input_layernorm"),
        ("head", "lm_head shares its weight with model.embed_tokens"),
        ("embedding", "model.embed_tokens shares its weight with lm_head"),
        ("tokens-tied-head", "shares its weight with"),
        ("nobody", "no adapter 'nobody'"),
    ],
)
def test_what_cannot_be_pinned_is_refused_by_name(name: str, message: str, llama: Made) -> None:
    with pytest.raises(lora_edge.LoraEdgeError, match=message) as caught:
        lora_edge.Runner(llama.bundles["fused"], pinned=["patterns", name])
    assert caught.value.hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pinned", ["patterns", [{"patterns": 1.0}], [3]])
def test_pinned_takes_names_and_none(pinned: Any, llama: Made) -> None:
    with pytest.raises(lora_edge.LoraEdgeError, match="expected a list of adapters' names") as bad:
        lora_edge.Runner(llama.bundles["fused"], pinned=pinned)
    assert "pinned=['name', None]" in bad.value.hint


def test_a_merged_bundle_has_nothing_to_pin(llama: Made, tmp_path: Path) -> None:
    own = {"patterns": llama.adapters["patterns"]}
    lora_edge.export(llama.base, own, "merged", tmp_path / "m")
    for pinned in ("patterns", None):
        with pytest.raises(lora_edge.LoraEdgeError, match="in a merged bundle") as caught:
            lora_edge.Runner(tmp_path / "m", pinned=[pinned])
        assert "Leave pinned out" in caught.value.hint


def test_a_weight_of_few_bits_is_refused_and_no_adapter_is_not(tmp_path: Path) -> None:
    base, own = make_kinds("llama", tmp_path, ["patterns"])
    lora_edge.export(base, own, output=tmp_path / "out", precision="int8")
    with pytest.raises(lora_edge.LoraEdgeError, match="is rounded to int8 codes") as caught:
        lora_edge.Runner(tmp_path / "out", pinned=["patterns"])
    assert "Leave it out" in caught.value.hint
    runner = lora_edge.Runner(tmp_path / "out", pinned=[None])
    off = runner.logits(IDS)
    assert _differs(off, lora_edge.Runner(tmp_path / "out").logits(IDS)) <= LIMIT
    assert _differs(off, runner.logits(IDS, adapter="patterns")) > 1e-2


def test_another_task_has_nothing_to_pin(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    lora_edge.export(base, {}, output=tmp_path / "out", task="feature-extraction")
    with pytest.raises(lora_edge.LoraEdgeError, match="bundle for feature-extraction"):
        lora_edge.Runner(tmp_path / "out", pinned=[None])


def test_an_older_bundle_is_refused_and_still_runs(copied: Callable[[Any], Path]) -> None:
    def forget(data: dict[str, Any]) -> None:
        for site in (*data["parts"]["decoder"]["sites"].values(), *data["uncovered"].values()):
            del site["weight"]

    old = copied(forget)
    with pytest.raises(lora_edge.LoraEdgeError, match="does not say where its weights") as caught:
        lora_edge.Runner(old, pinned=["patterns"])
    assert "Export the bundle again" in caught.value.hint
    runner = lora_edge.Runner(old, pinned=[None])
    assert _differs(runner.logits(IDS, adapter="patterns"), runner.logits(IDS)) > 1e-2
    bare = copied(lambda data: data["files"].pop("onnx/base.onnx"))
    with pytest.raises(lora_edge.LoraEdgeError, match=r"no onnx/base\.onnx") as caught:
        lora_edge.Runner(bare, pinned=[None])
    assert "Export the bundle again" in caught.value.hint


def test_a_weight_at_another_place_is_found_before_it_is_used(
    copied: Callable[[Any], Path],
) -> None:
    """Two layers of one shape, exchanged: nothing but the numbers can tell."""
    path = "model.layers.{}.self_attn.q_proj"

    def exchange(data: dict[str, Any]) -> None:
        sites = data["parts"]["decoder"]["sites"]
        first, second = (sites[path.format(i)]["weight"] for i in (0, 1))
        first["offset"], second["offset"] = second["offset"], first["offset"]

    runner = lora_edge.Runner(copied(exchange), pinned=["all-linear", None])
    with pytest.raises(lora_edge.BundleError, match=r"pinned, all-linear does not give what"):
        runner.logits(IDS, adapter="all-linear")
    assert runner.logits(IDS).any()  # no adapter changes no weight
    assert runner.logits(IDS, adapter="patterns").any()


def test_one_lost_layer_is_found_before_a_session_is_used(
    llama: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if ONNX Runtime had passed over the weight that it was given."""

    def lossy(*args: Any) -> dict[str, Any]:
        values = merged_values(*args)
        return {name: x for name, x in values.items() if "layers.1.self_attn.q_proj" not in name}

    monkeypatch.setattr("lora_edge.runtime.pinned.merged_values", lossy)
    runner = lora_edge.Runner(llama.bundles["fused"], pinned=["all-linear"])
    with pytest.raises(lora_edge.BundleError, match=r"pinned, all-linear does not give what"):
        runner.logits(IDS, adapter="all-linear")


def test_damage_is_found_when_the_session_is_opened(copied: Callable[[Any], Path]) -> None:
    site = "model.layers.0.self_attn.q_proj"

    def weight(**fields: Any) -> Callable[[dict[str, Any]], None]:
        return lambda data: data["parts"]["decoder"]["sites"][site]["weight"].update(fields)

    changed = copied(lambda _: None)
    with (changed / "onnx" / "base.onnx").open("ab") as stream:
        stream.write(b"\0")
    runner = lora_edge.Runner(changed, pinned=["patterns"])
    with pytest.raises(lora_edge.LoraEdgeError, match=r"base\.onnx differs from its hash"):
        runner.logits(IDS, adapter="patterns")
    behind = copied(weight(offset=1 << 40))
    with pytest.raises(lora_edge.LoraEdgeError, match="at byte 1099511627776"):
        lora_edge.Runner(behind, pinned=["patterns"]).logits(IDS, adapter="patterns")
    narrow = copied(weight(shape=[64, 3]))
    with pytest.raises(lora_edge.LoraEdgeError, match=r"does not hold model\.layers\.0"):
        lora_edge.Runner(narrow, pinned=["patterns"]).logits(IDS, adapter="patterns")
    renamed = copied(weight(name="nothing"))
    with pytest.raises(lora_edge.LoraEdgeError, match="cannot be loaded"):
        lora_edge.Runner(renamed, pinned=["patterns"]).logits(IDS, adapter="patterns")


def test_a_pinned_adapter_is_not_replaced(llama: Made) -> None:
    runner = lora_edge.Runner(llama.bundles["fused"], pinned=["patterns"])
    with pytest.raises(lora_edge.LoraEdgeError, match="'patterns' cannot be replaced: it is pin"):
        runner.override("patterns", None)
    runner.override("all-linear", None)


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("qwen2", ("tokens-untied", "tokens-of-the-head")),
        ("gpt2", ("conv1d", "conv1d-dora", "positions")),
    ],
)
def test_untied_embeddings_heads_and_conv1d(
    key: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    bundle = _make(key, names, ["fused"], tmp_path).bundles["fused"]
    plain, runner = lora_edge.Runner(bundle), lora_edge.Runner(bundle, pinned=names)
    ids = np.concatenate([IDS, np.tile([2, 3, 6, 8], (2, 1))], axis=1)
    for name in names:
        own = runner.logits(ids, adapter=name)
        assert runner._session_for(name, 2)[0] is not runner.decoder
        assert _differs(own, plain.logits(ids, adapter=name)) <= LIMIT
        assert _differs(own, plain.logits(ids)) > 1e-3


def test_the_manifest_says_where_each_weight_is(llama: Made) -> None:
    from safetensors.numpy import load_file

    bundle = load_bundle(llama.bundles["fused"])
    again = Manifest.from_json(bundle.manifest.to_json())
    assert again == bundle.manifest
    parameters = load_file(llama.base / "model.safetensors")
    norms = {x for x, site in again.sites.items() if site.kind == "norm"}
    assert norms
    for path, site in again.sites.items():
        if path in norms:
            assert site.weight is None
            continue
        assert site.weight is not None, path
        data = bundle.directory / "onnx" / "model.onnx_data"
        found = np.memmap(data, site.weight.dtype, "r", site.weight.offset, site.weight.shape)
        tied = path in again.tied
        parameter = "model.embed_tokens.weight" if tied else f"{path}.weight"
        turned = site.weight.transposed or site.kind == "embedding"
        np.testing.assert_array_equal(found if turned else found.T, parameters[parameter])
        assert site.weight.readers == 1 + tied


@pytest.mark.parametrize("transposed", [False, True])
def test_packed_projections_are_merged_by_their_columns(transposed: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((7, 12)).astype(np.float32)  # [in, q and k]
    data = tmp_path / "data"
    stored = np.ascontiguousarray(weight.T if transposed else weight)
    data.write_bytes(b"\0" * 16 + stored.tobytes())
    sites = {
        path: SiteEntry(
            7, out, weight=WeightEntry("qk", "float32", stored.shape, 16, transposed, start)
        )
        for path, out, start in (("q", 8, 0), ("k", 4, 8))
    }
    a, b, gain = (rng.standard_normal(x).astype(np.float32) for x in ((7, 3), (3, 4), 4))
    ((name, value),) = merged_values(
        data, sites, {"k": SiteChange(Factors(a, b)), "q": SiteChange(gain=np.tile(gain, 2))}
    ).items()
    expected = weight.astype(np.float64)
    expected[:, 8:] += a.astype(np.float64) @ b
    expected[:, :8] *= 1 + np.tile(gain, 2).astype(np.float64)
    assert name == "qk"
    found = value.numpy()
    np.testing.assert_array_equal(found.T if transposed else found, expected.astype(np.float32))
    assert np.abs(expected - weight).max() > 0.1
