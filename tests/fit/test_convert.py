"""Other adapter types of PEFT: converted with the error that is made, or refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lora_edge
from lora_edge.adapter.directory import ORIGINAL_CONFIG_FILE
from lora_edge.adapter.load import load_adapter
from lora_edge.adapter.types import CONVERTIBLE, MERGE_FIRST, type_refusal
from lora_edge.cli import cli, main
from lora_edge.fit.convert import convert
from tests.support.adapters import make_adapter
from tests.support.families import make_base

FULL = 64  # the smallest side of every adapted layer of the base
TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.tensor(np.random.default_rng(0).integers(0, 256, (2, 11)))

# name -> PEFT's config and its settings; MiSS in its exact form and in the one that needs an SVD
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "C3A": (peft.C3AConfig, {"block_size": 8}),
    "DELORA": (peft.DeloraConfig, {"r": 6}),
    "FOURIERFT": (peft.FourierFTConfig, {"n_frequency": 50, "scaling": 15}),
    "GRALORA": (peft.GraloraConfig, {"r": 8, "gralora_k": 2}),
    "LOHA": (peft.LoHaConfig, {"r": 5, "alpha": 7}),
    "LOKR": (peft.LoKrConfig, {"r": 3, "alpha": 5, "rank_pattern": {"down_proj": 2}}),
    "MISS": (peft.MissConfig, {"r": 6}),
    "MISS bat": (peft.MissConfig, {"r": 8, "init_weights": "bat"}),
    "MISS mini": (peft.MissConfig, {"r": 6, "mini_r": 8, "init_weights": "mini"}),
    "PSOFT": (peft.PsoftConfig, {"r": 8}),
    "RANDLORA": (peft.RandLoraConfig, {"r": 6}),
    "TINYLORA": (peft.TinyLoraConfig, {}),
    "UNILORA": (peft.UniLoraConfig, {}),
    "VBLORA": (peft.VBLoRAConfig, {"vector_length": 8, "num_vectors": 16}),
    "VERA": (peft.VeraConfig, {"r": 9}),
    "WAVEFT": (peft.WaveFTConfig, {"n_frequency": 50}),
}
EXACT = ("MISS", "MISS mini")
# Types that PEFT does not convert but merges, as their hint says.
MERGEABLE: dict[str, tuple[Any, dict[str, Any]]] = {
    "ADALORA": (peft.AdaLoraConfig, {"total_step": 10}),
    "BOFT": (peft.BOFTConfig, {}),
    "GLORA": (peft.GloraConfig, {}),
    "HIRA": (peft.HiraConfig, {}),
    "HRA": (peft.HRAConfig, {}),
    "IA3": (peft.IA3Config, {"feedforward_modules": []}),
    "LN_TUNING": (peft.LNTuningConfig, {"target_modules": ["input_layernorm"]}),
    "OFT": (peft.OFTConfig, {"oft_block_size": 8}),
    "OSF": (peft.OSFConfig, {}),
    "PVERA": (peft.PveraConfig, {"r": 8}),
    "ROAD": (peft.RoadConfig, {}),
    "SHIRA": (peft.ShiraConfig, {}),
}
PROMPTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "CPT": (peft.CPTConfig, {}),
    "PREFIX_TUNING": (peft.PrefixTuningConfig, {"num_virtual_tokens": 4}),
    "PROMPT_TUNING": (peft.PromptTuningConfig, {"num_virtual_tokens": 4}),
    "P_TUNING": (peft.PromptEncoderConfig, {"num_virtual_tokens": 4}),
}


def _plain(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base).eval()


def _make(base: Path, config: Any, directory: Path | None = None, **settings: Any) -> Any:
    """A model with a perturbed adapter, so that its delta is not zero; saved if asked for."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(_plain(base), config(task_type="CAUSAL_LM", **settings)).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        if directory is not None:
            model.save_pretrained(directory, save_embedding_layers=False)
    return model


def _load(base: Path, directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out, which PEFT corrects itself
        return peft.PeftModel.from_pretrained(_plain(base), directory).eval()


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits[:, -IDS.shape[1] :]
    return found


def _relative(found: Any, wanted: Any, without: Any) -> float:
    """The error as a share of the adapter's effect."""
    found, wanted, without = (np.asarray(x, np.float64) for x in (found, wanted, without))
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted - without))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def off(base: Path) -> torch.Tensor:
    return _logits(_plain(base))


@pytest.fixture(scope="module")
def originals(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("originals")
    for name, (config, settings) in KINDS.items():
        _make(base, config, root / name, target_modules=TARGETS, **settings)
    return {name: root / name for name in KINDS}


def test_every_type_that_peft_converts_is_tried_here() -> None:
    assert {name.partition(" ")[0] for name in KINDS} == CONVERTIBLE
    tuners = Path(peft.__file__).parent / "tuners"
    able = {
        file.parent.name.upper()
        for file in tuners.glob("*/layer.py")
        if "def supports_lora_conversion" in file.read_text(encoding="utf-8")
    }
    # These override it to say no; LoRA needs none.
    assert able - {"HIRA", "SHIRA", "LORA"} == CONVERTIBLE


@pytest.mark.parametrize("name", KINDS)
def test_at_full_rank_the_lora_does_what_the_original_does(
    name: str, base: Path, originals: dict[str, Path], off: torch.Tensor, tmp_path: Path
) -> None:
    original, output = _load(base, originals[name]), tmp_path / "lora"
    made = convert(originals[name], base, FULL, output)
    layers = {f"model.layers.{i}.{n}" for i in (0, 1) for n in _paths()}
    assert set(made.errors) == set(made.ranks) == set(load_adapter(output).modules) == layers
    assert made.peft_type == name.partition(" ")[0]
    assert 0 < made.worst < 2e-5 or name in EXACT
    assert made.worst < 2e-5
    wanted = _logits(original)
    assert _relative(wanted, off, wanted) > 0  # finite, so it has an effect
    assert _relative(_logits(_load(base, output)), wanted, off) < 1e-4


@pytest.mark.parametrize("name", [name for name in KINDS if name not in EXACT])
def test_at_rank_one_the_error_is_large_and_is_the_merged_weights(
    name: str, base: Path, originals: dict[str, Path], off: torch.Tensor, tmp_path: Path
) -> None:
    made = convert(originals[name], base, 1, tmp_path / "lora")
    assert set(made.ranks.values()) == {1}
    assert made.mean > 0.1
    assert made.mean <= made.worst < 1
    original = _load(base, originals[name])
    assert _relative(_logits(_load(base, made.directory)), _logits(original), off) > 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = dict(original.merge_and_unload().named_parameters())
    plain = dict(_plain(base).named_parameters())
    for path, module in load_adapter(made.directory).modules.items():
        whole = (merged[f"{path}.weight"] - plain[f"{path}.weight"]).detach().double().numpy()
        delta = module.scaling * module.b.astype(np.float64) @ module.a
        error = np.linalg.norm(delta - whole) / np.linalg.norm(whole)
        assert made.errors[path] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("name", EXACT)
def test_miss_keeps_its_own_rank_and_is_exact(
    name: str, base: Path, originals: dict[str, Path], tmp_path: Path
) -> None:
    made = convert(originals[name], base, 1, tmp_path / "lora")
    assert set(made.ranks.values()) == {6}
    assert made.worst < 1e-6


def test_a_share_of_the_energy_gives_each_layer_its_own_rank(
    base: Path, originals: dict[str, Path], off: torch.Tensor, tmp_path: Path
) -> None:
    some = convert(originals["RANDLORA"], base, 0.9, tmp_path / "some")
    more = convert(originals["RANDLORA"], base, 0.99, tmp_path / "more")
    assert len(set(some.ranks.values())) > 1
    assert all(some.ranks[path] < more.ranks[path] for path in some.ranks)
    assert some.worst <= 0.1**0.5 < 2 * some.worst
    assert more.worst <= 0.01**0.5 < 2 * more.worst
    assert load_adapter(some.directory).ranks() == some.ranks
    wanted = _logits(_load(base, originals["RANDLORA"]))
    found = [_relative(_logits(_load(base, x.directory)), wanted, off) for x in (some, more)]
    assert found[1] < found[0] < 1


@pytest.mark.parametrize("name", ["GRALORA", "TINYLORA", "VBLORA", "VERA"])
def test_gpt2s_transposed_layers_convert(name: str, tmp_path: Path) -> None:
    base = make_base("gpt2", tmp_path / "base")
    config, settings = KINDS[name]
    original = _make(
        base, config, tmp_path / "a", target_modules=["c_attn", "mlp.c_fc"], **settings
    )
    made = convert(tmp_path / "a", base, FULL, tmp_path / "lora")
    assert len(made.errors) == 4
    assert made.worst < 2e-5
    found = _logits(_load(base, tmp_path / "lora"))
    assert _relative(found, _logits(original), _logits(_plain(base))) < 1e-4


def test_converting_twice_gives_the_same_bytes(
    base: Path, originals: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        convert(originals["LOHA"], base, 4, tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    kept = (tmp_path / "a" / ORIGINAL_CONFIG_FILE).read_bytes()
    assert kept == (originals["LOHA"] / "adapter_config.json").read_bytes()


def test_excluded_layers_stay_excluded(base: Path, off: torch.Tensor, tmp_path: Path) -> None:
    settings = {"r": 4, "target_modules": TARGETS, "exclude_modules": r".*layers\.0\..*q_proj"}
    original = _make(base, peft.LoHaConfig, tmp_path / "a", **settings)
    made = convert(tmp_path / "a", base, FULL, tmp_path / "lora")
    assert len(made.errors) == 5
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", UserWarning
        )  # PEFT warns of layers that the file has no tensors for
        found = peft.PeftModel.from_pretrained(_plain(base), made.directory).eval()
    assert _relative(_logits(found), _logits(original), off) < 1e-4


def test_saved_modules_are_carried_over_verbatim(
    base: Path, off: torch.Tensor, tmp_path: Path
) -> None:
    """Of a saved module with parts, PEFT's own conversion keeps one tensor, wrongly named."""
    settings = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["mlp", "norm"]}
    original = _make(base, peft.LoHaConfig, tmp_path / "a", **settings)
    made = convert(tmp_path / "a", base, FULL, tmp_path / "lora")
    before, after = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("a", "lora"))
    saved = {key for key in before if "hada_" not in key}
    assert len(saved) == 11  # PEFT takes both layers' norms for the suffix, too
    assert set(after) == saved | {key for key in after if ".lora_" in key}
    assert all(torch.equal(before[key], after[key]) for key in saved)
    assert _relative(_logits(_load(base, made.directory)), _logits(original), off) < 1e-4
    del after["base_model.model.model.norm.weight"]
    save_file(after, made.directory / "adapter_model.safetensors")
    with pytest.raises(KeyError):
        _load(base, made.directory)


def test_trainers_record_goes_along(base: Path, originals: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(originals["LOHA"], tmp_path / "a")
    (source / "training.json").write_text(json.dumps({"base_fingerprint": "0" * 64}))
    assert convert(source, base, 2, tmp_path / "lora").directory == tmp_path / "lora"
    assert load_adapter(tmp_path / "lora").base_fingerprint == "0" * 64
    with pytest.raises(lora_edge.AdapterError, match="fingerprint"):
        lora_edge.export(base, {"a": source}, output=tmp_path / "out", convert=2)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "lora"}


def _damage_bias(source: Path) -> None:
    _edit(source, bias="all")


def _damage_field(source: Path) -> None:
    _edit(source, brand_new_field=3)


def _damage_extra(source: Path) -> None:
    file = source / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.lm_head.weight": torch.ones(256, 64)}, file)


def _damage_missing(source: Path) -> None:
    file = source / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, file)


def _damage_nan(source: Path) -> None:
    file = source / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[sorted(tensors)[0]] *= float("nan")
    save_file(tensors, file)


def _damage_base(source: Path) -> None:
    """A saved base weight that is not the base's: PEFT writes it over the base's."""
    file = source / "adapter_model.safetensors"
    key = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    save_file(load_file(file) | {key: torch.ones(128, 64)}, file)


def _damage_pickle(source: Path) -> None:
    (source / "adapter_model.safetensors").rename(source / "adapter_model.bin")


def _edit(source: Path, **fields: Any) -> None:
    file = source / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_damage_bias, r"bias is 'all'.*VERA.*drop the trained biases"),
        (_damage_field, r"brand_new_field is 3.*does not know"),
        (_damage_extra, r"1 of its tensors are no part of what peft loads.*lm_head"),
        (_damage_missing, r"lacks 1 of its tensors"),
        (_damage_nan, r"layers\.\d.*NaN|peft cannot convert it"),
        (_damage_base, r"changes the base's own weight of model\.layers\.0\.self_attn\.q_proj"),
        (_damage_pickle, r"adapter_model\.bin is a pickle"),
    ],
)
def test_nothing_is_dropped_in_silence(
    damage: Any, message: str, base: Path, originals: dict[str, Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(originals["VERA"], tmp_path / "a"))
    damage(source)
    with pytest.raises(lora_edge.AdapterError, match=message) as caught:
        convert(source, base, 4, tmp_path / "lora")
    assert caught.value.hint
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


@pytest.mark.parametrize(
    ("family", "name", "settings", "message"),
    [
        ("llama", "TINYLORA", {"target_modules": ["embed_tokens"]}, r"embed_tokens, a Embedding"),
        ("gpt2", "FOURIERFT", {"target_modules": ["c_attn"]}, r"c_attn, a Conv1D.*FOURIERFT"),
        ("gpt2", "WAVEFT", {"target_modules": ["c_attn"]}, r"c_attn, a Conv1D.*WAVEFT"),
    ],
)
def test_layers_that_peft_cannot_convert_are_named(
    family: str, name: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = make_base(family, tmp_path / "base")
    config, own = KINDS[name]
    _make(model, config, tmp_path / "a", **own | settings)
    with pytest.raises(lora_edge.UnsupportedAdapterError, match=message) as caught:
        convert(tmp_path / "a", model, 4, tmp_path / "lora")
    assert caught.value.hint == MERGE_FIRST
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (FULL + 1, r"rank 65 is above the largest that model\.layers\.0\..* can have, 64"),
        (0, "rank of a conversion is 0"),
        (-3, "rank of a conversion is -3"),
        (True, "rank of a conversion is True"),
        (1.0, r"rank of a conversion is 1\.0"),
        (float("nan"), "rank of a conversion is nan"),
    ],
)
def test_ranks_that_cannot_be(
    rank: Any, message: str, base: Path, originals: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(lora_edge.AdapterError, match=message):
        convert(originals["LOHA"], base, rank, tmp_path / "lora")
    assert not list(tmp_path.iterdir())


def test_another_base_or_a_lora_is_refused(
    base: Path, originals: dict[str, Path], tmp_path: Path
) -> None:
    other = make_base("llama", tmp_path / "other", hidden_size=96)
    with pytest.raises(lora_edge.AdapterError, match="peft cannot load it"):
        convert(originals["LOHA"], other, 4, tmp_path / "lora")
    plain = make_adapter(base, tmp_path / "plain", r=4, target_modules=TARGETS)
    with pytest.raises(lora_edge.AdapterError, match="is a LoRA already"):
        convert(plain, base, 4, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_command_line_converts_reports_and_proves(
    base: Path,
    originals: dict[str, Path],
    off: torch.Tensor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = make_adapter(base, tmp_path / "plain", r=4, lora_alpha=8, target_modules=TARGETS)
    names = ["LOHA", "LOKR", "VERA", "MISS"]
    given = [f"--adapter={name.lower()}={originals[name]}" for name in names]
    given += [f"--adapter=plain={plain}", f"--convert={FULL}", f"-o{tmp_path / 'out'}"]
    assert _export([str(base), *given]) == 0
    said = capsys.readouterr().err
    bundle = lora_edge.load_bundle(tmp_path / "out")
    bundle.verify_all()
    runner = lora_edge.Runner(tmp_path / "out")
    assert bundle.manifest.adapters["plain"].conversion is None
    assert "converting plain" not in said
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for name in names:
        entry = bundle.manifest.adapters[name.lower()]
        made = entry.conversion
        assert entry.proved
        assert made is not None
        assert (made.peft_type, made.rank) == (name, FULL)
        assert 0 < made.mean_error <= made.worst_error < 2e-5 or name in EXACT
        assert set(entry.ranks.values()) == ({6} if name in EXACT else {FULL})
        assert f"{name.lower()}: {name} approximated by a LoRA of rank" in said
        assert f"{made.worst_error:.2e} at worst" in said
        assert f"approximates an adapter of type {name}" in card
        folder = tmp_path / "out" / "adapters" / name.lower() / "peft"
        digest = hashlib.sha256()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            digest.update((folder / file).read_bytes())
        assert entry.digest == digest.hexdigest()
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
        kept = (folder / ORIGINAL_CONFIG_FILE).read_bytes()
        assert kept == (originals[name] / "adapter_config.json").read_bytes()
        wanted = _logits(_load(base, originals[name]))
        found = runner.logits(IDS.numpy(), adapter=name.lower())
        assert _relative(found, wanted, off) < 2e-3
        assert _relative(runner.logits(IDS.numpy(), adapter="plain"), wanted, off) > 0.1
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "out")]).output
    assert "approximates a LOKR: relative error of ΔW" in shown


def test_merged_bundle_of_a_converted_adapter(
    base: Path, originals: dict[str, Path], off: torch.Tensor, tmp_path: Path
) -> None:
    given = {"a": originals["LOKR"]}
    made = lora_edge.export(base, given, "merged", tmp_path / "out", convert=0.99999)
    entry = made.manifest.adapters["a"]
    assert entry.proved
    assert entry.conversion is not None
    assert 0 < entry.conversion.worst_error <= 1e-5**0.5
    found = lora_edge.Runner(tmp_path / "out").logits(IDS.numpy())
    assert _relative(found, _logits(_load(base, originals["LOKR"])), off) < 0.02


def _export(arguments: list[str]) -> object:
    with pytest.raises(SystemExit) as caught:
        main(["export", *arguments])
    return caught.value.code


@pytest.fixture
def refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What an export of the base is refused with, given its options; it leaves nothing behind."""

    def export(*options: str) -> str:
        output = tmp_path / "out"
        assert _export([str(base), *options, "-o", str(output)]) == 2
        said = capsys.readouterr()
        assert not said.out
        assert not output.exists()
        assert not list(output.parent.glob(f".{output.name}*"))
        return said.err

    return export


@pytest.mark.parametrize("mode", ["switchable", "merged"])
@pytest.mark.parametrize("name", sorted(CONVERTIBLE))
def test_without_the_option_the_hint_names_it(
    name: str, mode: str, originals: dict[str, Path], refused: Callable[..., str]
) -> None:
    said = refused(f"-aa={originals[name]}", "--mode", mode)
    assert f"peft_type is '{name}', expected 'LORA'" in said
    assert "hint: Export it with --convert RANK" in said


@pytest.mark.parametrize("mode", ["switchable", "merged"])
@pytest.mark.parametrize("option", [[], ["--convert", "8"]])
@pytest.mark.parametrize(
    "name", sorted({str(x.value) for x in PeftType} - CONVERTIBLE - {"LORA"} | {"BONE"})
)
def test_other_types_are_refused_by_name(
    name: str, option: list[str], mode: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    source = tmp_path / "a"
    source.mkdir()
    (source / "adapter_config.json").write_text(json.dumps({"peft_type": name}))
    said = refused(f"-aa={source}", "--mode", mode, *option)
    assert f"peft_type is '{name}', expected 'LORA': " in said
    hint = said.partition("hint: ")[2]
    assert hint.strip()
    assert "--convert" not in hint or name == "BONE"


@pytest.mark.parametrize("mode", ["switchable", "merged"])
@pytest.mark.parametrize("option", [[], ["--convert", "8"]])
@pytest.mark.parametrize("field", ["use_qalora", "arrow_config"])
def test_variants_of_lora_are_not_converted(
    field: str,
    option: list[str],
    mode: str,
    base: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    source = make_adapter(base, tmp_path / "a", r=4, target_modules=TARGETS)
    _edit(source, **{field: True if field == "use_qalora" else {"top_k": 2}})
    said = refused(f"-aa={source}", "--mode", mode, *option)
    assert f"{field} is " in said
    assert "hint: " in said


@pytest.mark.parametrize("name", MERGEABLE)
def test_types_that_peft_only_merges_are_merged_as_the_hint_says(
    name: str, base: Path, off: torch.Tensor, tmp_path: Path
) -> None:
    config, settings = MERGEABLE[name]
    model = _make(base, config, tmp_path / "a", **{"target_modules": TARGETS} | settings)
    assert not model.supports_lora_conversion()
    assert type_refusal(name)[1] == MERGE_FIRST
    with pytest.raises(lora_edge.UnsupportedAdapterError, match=f"'{name}'"):
        convert(tmp_path / "a", base, 8, tmp_path / "lora")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SHiRA's delta is a sparse tensor, of which torch warns
        wanted = _logits(model)
        merged = _logits(model.merge_and_unload())
    assert _relative(merged, wanted, off) < 1e-4


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_can_be_neither_merged_nor_converted(name: str, base: Path, tmp_path: Path) -> None:
    config, settings = PROMPTS[name]
    model = _make(base, config, tmp_path / "a", **settings)
    assert not model.supports_lora_conversion()
    assert not hasattr(model.base_model, "merge_and_unload")
    with pytest.raises(lora_edge.UnsupportedAdapterError, match="changes no weight") as caught:
        convert(tmp_path / "a", base, 8, tmp_path / "lora")
    assert "Train a LoRA instead" in caught.value.hint


@pytest.mark.parametrize("text", ["0", "-2", "1.0", "1.5", "x", "nan", ""])
def test_command_line_refuses_ranks_that_cannot_be(text: str, refused: Callable[..., str]) -> None:
    said = refused("--convert", text)
    assert "is not a whole number from 1 on, or a share between 0 and 1" in said


def _paths() -> tuple[str, ...]:
    return ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
