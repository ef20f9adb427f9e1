"""sentence-transformers' files: what is read, what is copied, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_edge
from lora_edge.bundle.sentence import (
    SentenceModules,
    load_sentence_modules,
    sentence_files,
    write_sentence_modules,
)
from lora_edge.errors import (
    BundleError,
    DataError,
    OptionError,
    UnsupportedAdapterError,
    UnsupportedModelError,
)
from lora_edge.maths.pooling import Pooling
from lora_edge.runtime import Runner
from tests.support.failing import signed
from tests.support.paths import MODELS


def _write(folder: Path, name: str, content: Any) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _modules(*kinds: str, prefix: str = "sentence_transformers.models.") -> list[dict[str, Any]]:
    return [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": prefix + kind}
        for i, kind in enumerate(kinds)
    ]


def _folder(folder: Path, pooling: dict[str, Any], *more: str, path: str = "1_Pooling") -> Path:
    modules = _modules("Transformer", "Pooling", *more)
    modules[1]["path"] = path
    _write(folder, "modules.json", modules)
    _write(folder, f"{path}/config.json", pooling)
    return folder


def test_a_folder_without_files_means_the_mean(tmp_path: Path) -> None:
    assert load_sentence_modules(tmp_path) == SentenceModules()


def test_the_files_of_sentence_transformers_are_read(tmp_path: Path) -> None:
    flags = {"word_embedding_dimension": 4, "pooling_mode_cls_token": True}
    _folder(tmp_path, {**flags, "pooling_mode_mean_tokens": False})
    assert load_sentence_modules(tmp_path) == SentenceModules(Pooling(("cls",)))
    _folder(
        tmp_path, {"pooling_mode_lasttoken": True, "pooling_mode_max_tokens": True}, "Normalize"
    )
    _write(tmp_path, "sentence_bert_config.json", {"max_seq_length": 33, "do_lower_case": True})
    prompts = {"prompts": {"query": "q: ", "none": ""}, "default_prompt_name": "query"}
    _write(tmp_path, "config_sentence_transformers.json", prompts)
    found = load_sentence_modules(tmp_path)
    assert found.pooling == Pooling(("max", "lasttoken"), normalize=True)
    assert (found.max_length, found.lower_case) == (33, True)
    assert (found.prompt(None), found.prompt("none")) == ("q: ", "")
    with pytest.raises(OptionError, match="no prompt named 'x'; the model has none, query"):
        found.prompt("x")
    _folder(tmp_path, {"pooling_mode": ["mean", "cls"], "include_prompt": False})
    assert load_sentence_modules(tmp_path).pooling == Pooling(("mean", "cls"), False, False)


def test_the_tokenizer_says_where_texts_are_cut(tmp_path: Path) -> None:
    """Newer releases keep max_seq_length there alone."""
    _folder(tmp_path, {"pooling_mode": "mean"})
    _write(tmp_path, "tokenizer_config.json", {"model_max_length": 7})
    assert load_sentence_modules(tmp_path).max_length == 7
    _write(tmp_path, "tokenizer_config.json", {"model_max_length": int(1e30)})
    assert load_sentence_modules(tmp_path).max_length is None


@pytest.mark.parametrize("path", ["1_Pooling", "pooling", "a/b"])
def test_the_folder_that_modules_json_names_is_read_and_copied(path: str, tmp_path: Path) -> None:
    _folder(tmp_path, {"pooling_mode": "cls"}, path=path)
    assert load_sentence_modules(tmp_path).pooling == Pooling(("cls",))
    assert sentence_files(tmp_path) == ("modules.json", f"{path}/config.json")
    shutil.rmtree(tmp_path / path)
    with pytest.raises(BundleError, match=f"names the pooling '{path}'"):
        load_sentence_modules(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pooling_mode": "splade"}, "by \\['splade'\\] is not known"),
        ({"pooling_mode": []}, "by \\[\\] is not known"),
        ({"pooling_mode": 3}, "by 3 is not known"),
        ({"pooling_mode": "mean", "include_prompt": None}, "include_prompt is None"),
        ({"pooling_mode": "mean", "pooling_temperature": 2}, "'pooling_temperature' is not known"),
    ],
)
def test_other_ways_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    _folder(tmp_path, config)
    with pytest.raises(UnsupportedModelError, match=message):
        load_sentence_modules(tmp_path)


@pytest.mark.parametrize(
    "kinds",
    [
        ("Transformer", "Pooling", "Dense"),
        ("Transformer", "Pooling", "LayerNorm", "Normalize"),
        ("Transformer", "WordWeights", "Pooling"),
        ("Transformer", "WeightedLayerPooling", "Pooling"),
        ("WordEmbeddings", "Pooling"),
        ("CLIPModel",),
    ],
)
def test_other_modules_are_refused_by_name(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    _write(tmp_path, "modules.json", _modules(*kinds))
    _write(tmp_path, "1_Pooling/config.json", {"pooling_mode": "mean"})
    strange = next(kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize"))
    with pytest.raises(UnsupportedModelError, match=f"the module '{strange}' is not known"):
        load_sentence_modules(tmp_path)


def test_modules_in_another_order_or_of_other_packages_are_refused(tmp_path: Path) -> None:
    for kinds in (("Pooling", "Transformer"), ("Transformer",), ("Transformer", "Pooling") * 2):
        _write(tmp_path, "modules.json", _modules(*kinds))
        with pytest.raises(UnsupportedModelError, match="the modules are"):
            load_sentence_modules(tmp_path)
    _write(tmp_path, "modules.json", _modules("Transformer", "Pooling", prefix="custom_st."))
    with pytest.raises(UnsupportedModelError, match=r"the module 'custom_st\.Transformer'"):
        load_sentence_modules(tmp_path)
    (tmp_path / "modules.json").unlink()
    _write(tmp_path, "1_Pooling/config.json", {"pooling_mode": "cls"})
    with pytest.raises(UnsupportedModelError, match=r"no modules\.json that names it"):
        load_sentence_modules(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"transformer_task": "fill-mask"},
        {"module_output_name": "sentence_embedding"},
        {"modality_config": {"image": {"method": "forward"}}},
        {"processing_kwargs": {"text": {"padding": False}}},
        {"query_length": 32},
        {"a_new_setting": 1},
    ],
)
def test_settings_of_the_transformer_that_are_not_known(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    _folder(tmp_path, {"pooling_mode": "mean"})
    hidden = {"method": "forward", "method_output_name": "last_hidden_state"}
    known = {"transformer_task": "feature-extraction", "modality_config": {"text": hidden}}
    _write(tmp_path, "sentence_bert_config.json", known)
    load_sentence_modules(tmp_path)
    _write(tmp_path, "sentence_bert_config.json", settings)
    with pytest.raises(UnsupportedModelError, match=f"{next(iter(settings))} is"):
        load_sentence_modules(tmp_path)


@pytest.mark.parametrize("path", ["../x", "/etc", "a/../../x", "link"])
def test_a_folder_outside_is_refused(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "model"
    _folder(folder, {"pooling_mode": "mean"})
    (folder / "link").symlink_to(tmp_path)
    modules = _modules("Transformer", "Pooling")
    modules[1]["path"] = path
    _write(folder, "modules.json", modules)
    for read in (load_sentence_modules, sentence_files):
        with pytest.raises(BundleError, match=r"a module.s path is"):
            read(folder)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[")
    with pytest.raises(BundleError, match="is not JSON"):
        load_sentence_modules(tmp_path)
    _write(tmp_path, "modules.json", {"0": "Transformer"})
    with pytest.raises(BundleError, match="is not a JSON list"):
        load_sentence_modules(tmp_path)
    _folder(tmp_path, {"pooling_mode": "mean"})
    for prompts in (
        {"prompts": ["a"]},
        {"default_prompt_name": "a"},
        {"default_prompt_name": []},
        {"prompts": 3, "default_prompt_name": "a"},
    ):
        _write(tmp_path, "config_sentence_transformers.json", prompts)
        with pytest.raises(BundleError, match="the prompts are"):
            load_sentence_modules(tmp_path)


def test_an_export_pools_as_the_named_folder_says(tmp_path: Path) -> None:
    """The values of sentence-transformers 6.2.0 on the same folder, at two places."""
    pytest.importorskip("peft", reason="exports with it, which is not installed")
    base = Path(shutil.copytree(MODELS / "tiny-bert", tmp_path / "base"))
    config = {"pooling_mode": ["max", "cls", "weightedmean"], "include_prompt": False}
    _folder(base, config, "Normalize", path="pooling")
    settings = {"max_seq_length": 20, "do_lower_case": True}
    _write(base, "sentence_bert_config.json", settings)
    prompts = {"prompts": {"q": "query: river "}, "default_prompt_name": "q"}
    _write(base, "config_sentence_transformers.json", prompts)
    lora_edge.export(base, {}, output=tmp_path / "bundle", task="feature-extraction")
    runner = Runner(tmp_path / "bundle")
    texts = ["Hello river WORD", "the quick word: river Answer and more and more words"]
    found = runner.embed(texts)
    assert found.shape == (2, 384)
    np.testing.assert_allclose(found[:, [0, 200]], EXPECTED, atol=2e-6)
    np.testing.assert_array_equal(runner.embed(texts, prompt="query: river "), found)
    assert np.abs(runner.embed(texts, prompt="") - found).max() > 1e-3
    with pytest.raises(OptionError, match="both given"):
        runner.embed(texts, prompt="", prompt_name="q")


EXPECTED = [
    [0.07943706214427948, -0.03659938648343086],
    [0.12889878451824188, 0.024209076538681984],
]


def test_an_export_refuses_a_module_that_it_cannot_represent(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="exports with it, which is not installed")
    base = Path(shutil.copytree(MODELS / "tiny-bert", tmp_path / "base"))
    _folder(base, {"pooling_mode": "mean"}, "Dense")
    with pytest.raises(UnsupportedModelError, match="the module 'Dense' is not known"):
        lora_edge.export(base, {}, output=tmp_path / "bundle", task="feature-extraction")


@pytest.mark.parametrize("mode", ["switchable", "merged"])
def test_an_adapter_brings_modules_of_its_own(mode: Any, tmp_path: Path) -> None:
    """As sentence-transformers saves a model with an adapter; each row has its own pooling."""
    pytest.importorskip("peft", reason="exports with it, which is not installed")
    base = _folder(Path(shutil.copytree(MODELS / "tiny-bert", tmp_path / "base")), MEAN)
    other = _folder(_adapter(base, tmp_path / "other", 1), {"pooling_mode": "cls"}, "Normalize")
    same = _folder(_adapter(base, tmp_path / "same", 2), MEAN)
    given = {"other": other} if mode == "merged" else {"other": other, "same": same}
    target = tmp_path / "bundle"
    lora_edge.export(base, given, mode, target, task="feature-extraction")
    assert (target / "adapters/other/sentence_transformers/1_Pooling/config.json").is_file()
    assert not (target / "adapters/same/sentence_transformers").exists()
    runner = Runner(target)
    texts = ["Hello river", "Word: river"]
    hidden = runner.logits([[2, 5, 6, 3]], adapter="other")
    found = runner.embed(texts, "other")
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert hidden.shape[-1] == found.shape[-1]
    base_says, own = load_sentence_modules(base), load_sentence_modules(other, base)
    assert load_sentence_modules(target) == (own if mode == "merged" else base_says)
    if mode == "merged":
        report = lora_edge.validate(target, base, depth="quick")
        assert report.passed, report.table()
        (target / "1_Pooling" / "config.json").write_text('{"pooling_mode": "max"}')
        signed(target)
        report = lora_edge.validate(target, base, depth="quick")
        assert [x.name for x in report.failures] == ["file 1_Pooling/config.json"]
        return
    mixed = runner.embed(texts, ["same", "other"])
    np.testing.assert_allclose(mixed[1], found[1], atol=1e-5)
    np.testing.assert_allclose(mixed[0], runner.embed(texts, "same")[0], atol=1e-5)
    assert np.linalg.norm(mixed[0]) > 1.1
    with pytest.raises(DataError, match="other, same make embeddings in unlike ways"):
        runner.embed(texts, {"other": 0.5, "same": 0.5})
    wide = _folder(_adapter(base, tmp_path / "wide", 3), {"pooling_mode": ["cls", "max"]})
    lora_edge.add(target, {"wide": wide})
    runner = Runner(target)
    assert runner.embed(texts, "wide").shape == (2, 256)
    with pytest.raises(DataError, match=r"embeddings of \[128, 256\] numbers"):
        runner.embed(texts, ["same", "wide"])
    dense = _folder(_adapter(base, tmp_path / "dense", 3), MEAN, "Dense")
    with pytest.raises(UnsupportedAdapterError, match=r"adapter dense is refused.*'Dense'"):
        lora_edge.add(target, {"dense": dense})
    report = lora_edge.validate(target, base)
    assert report.passed, report.table()
    changed = target / "adapters/other/sentence_transformers/1_Pooling/config.json"
    changed.write_text('{"pooling_mode": "max"}', encoding="utf-8")
    signed(target)
    (case,) = [x for x in lora_edge.validate(target).failures if x.kind == "around"]
    assert case.name == "embeddings"


def test_lengths_of_a_merged_adapter(tmp_path: Path) -> None:
    """Those that its tokenizer says are written beside its modules; none cannot be said there."""
    pytest.importorskip("peft", reason="exports with it, which is not installed")
    base = _folder(Path(shutil.copytree(MODELS / "tiny-bert", tmp_path / "base")), MEAN)
    own = _folder(_adapter(base, tmp_path / "own", 1), {"pooling_mode": "cls"})
    settings = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    for limit, said in ((9, 9), (None, None)):
        stage = Path(shutil.copytree(base, tmp_path / f"stage-{limit}"))
        _write(own, "tokenizer_config.json", {**settings, "model_max_length": limit or int(1e30)})
        if said is None:
            with pytest.raises(UnsupportedAdapterError, match="it cuts no texts"):
                write_sentence_modules(stage, "feature-extraction", {"own": own}, merged=True)
            continue
        write_sentence_modules(stage, "feature-extraction", {"own": own}, merged=True)
        found = load_sentence_modules(stage)
        assert (found.max_length, found.pooling) == (said, Pooling(("cls",)))
        assert json.loads((stage / "tokenizer_config.json").read_text())["model_max_length"] == 128


MEAN = {"pooling_mode": "mean"}


def _adapter(base: Path, folder: Path, seed: int) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel, set_seed

    set_seed(seed)
    config = LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    get_peft_model(AutoModel.from_pretrained(base), config).save_pretrained(folder)
    return folder
