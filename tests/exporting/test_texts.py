"""Bases' and adapters' tokenizers in bundles: ids and chats equal transformers', kind by kind."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from lora_edge.base.checkpoint import Base
from lora_edge.bundle.bundle import file_entries
from lora_edge.bundle.manifest import AdapterEntry, Manifest
from lora_edge.bundle.part import Cache, Part
from lora_edge.errors import AdapterError, BaseModelError, MissingDependencyError
from lora_edge.exporting.texts import write_adapter_texts, write_base_text
from lora_edge.runtime.text.corpus import TEXTS
from lora_edge.runtime.text.tokenizer import Tokenizer

WORDS = [*TEXTS, "lower case words and UPPER CASE WORDS " * 3]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _byte_level(root: Path, *, legacy: bool = False) -> None:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        WORDS,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
        ),
    )
    config: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer"}
    config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    _save(made, root, config, legacy)


def _sentencepiece_bpe(root: Path, *, legacy: bool = False) -> None:
    """Llama's kind: a metaspace, bytes for what is unknown, a beginning."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{x:02X}>" for x in range(256))]
    made.train_from_iterator(
        [text.replace(" ", "▁") for text in WORDS],
        trainers.BpeTrainer(vocab_size=500, special_tokens=special),
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    _save(made, root, config, legacy)


def _word_piece(root: Path, *, legacy: bool = False) -> None:
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(
        WORDS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special)
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    config |= {f"{x.lower()}_token": f"[{x}]" for x in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    _save(made, root, {**config, "clean_up_tokenization_spaces": True}, legacy)


def _unigram(root: Path, *, legacy: bool = False) -> None:
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(
        WORDS, trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>")
    )
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    _save(made, root, {**config, "eos_token": "</s>", "unk_token": "<unk>"}, legacy)


def _save(made: Any, root: Path, config: dict[str, Any], legacy: bool) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    (root / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if not legacy:
        made.save(str(root / "tokenizer.json"))
        return
    data = json.loads(made.to_str())["model"]
    if data["type"] == "WordPiece":
        words = sorted(data["vocab"], key=data["vocab"].__getitem__)
        (root / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    else:
        (root / "vocab.json").write_text(json.dumps(data["vocab"]))
        merges = [" ".join(pair) for pair in data["merges"]]
        text = "\n".join(["#version: 0.2", *merges]) + "\n"
        (root / "merges.txt").write_text(text, encoding="utf-8")


KINDS: dict[str, Callable[..., None]] = {
    "byte-level BPE": _byte_level,
    "SentencePiece BPE": _sentencepiece_bpe,
    "WordPiece": _word_piece,
    "Unigram": _unigram,
}


def _manifest(stage: Path, *names: str, mode: Any = "switchable", rows: int = 2000) -> Manifest:
    inputs = ("input_ids", "attention_mask")
    part = Part("onnx/model.onnx", "fused", "trace", inputs, "logits", rows, 64)
    part = dataclasses.replace(part, cache=Cache("shared", 1, 1, 8))
    entries = {x: AdapterEntry(x, f"{x}.f", "LoRA", {}, "d", "f", True) for x in names}
    return Manifest(
        mode,
        "text-generation",
        "fp32",
        {"decoder": part},
        {},
        (),
        entries,
        {},
        {},
        file_entries(stage),
    )


def _written(folder: Path, stage: Path) -> list[str]:
    stage.mkdir()
    said: list[str] = []
    write_base_text(Base(folder, "base", {}), stage, _manifest(stage), said.append)
    return said


def _theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _assert_alike(ours: Tokenizer, theirs: Any) -> None:
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids, text
        assert (
            ours.encode(text, special_tokens=False)
            == theirs(text, add_special_tokens=False)["input_ids"]
        )
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    messages = [{"role": "user", "content": "Grüße </s> <|endoftext|>"}]
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ours.encode_chat(messages) == theirs(text, add_special_tokens=False)["input_ids"]
    special = theirs.special_tokens_map
    assert ours.special_tokens.items() >= {k: x for k, x in special.items() if str(x) == x}.items()


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_transformers(kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "base")
    _written(tmp_path / "base", tmp_path / "stage")
    _assert_alike(Tokenizer(tmp_path / "stage"), _theirs(tmp_path / "base"))


@pytest.mark.parametrize("kind", ["byte-level BPE", "WordPiece"])
def test_a_tokenizer_json_is_made_where_the_base_has_none(kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "base", legacy=True)
    assert not (tmp_path / "base" / "tokenizer.json").exists()
    said = _written(tmp_path / "base", tmp_path / "stage")
    assert "written anew" in said[0]
    _assert_alike(Tokenizer(tmp_path / "stage"), _theirs(tmp_path / "base"))


def test_a_sentencepiece_model_is_read(tmp_path: Path) -> None:
    """``spiece.model`` alone, as T5 and ALBERT have it."""
    from transformers.convert_slow_tokenizer import import_protobuf

    spm = import_protobuf()
    base = tmp_path / "base"
    base.mkdir()
    proto = spm.ModelProto()
    letters = sorted({x for text in TEXTS for x in text if x.isalnum()})
    words = ["▁", "▁the", "▁Hello", "o", "x", "▁a", "quick", *letters]
    pieces = [("<pad>", 3, 0.0), ("</s>", 3, 0.0), ("<unk>", 2, 0.0)]
    pieces += [(x, 1, -float(i % 17) - 1) for i, x in enumerate(dict.fromkeys(words))]
    for piece, kind, score in pieces:
        proto.pieces.add(piece=piece, type=kind, score=score)
    proto.trainer_spec.model_type = 1  # unigram
    proto.trainer_spec.unk_id, proto.trainer_spec.pad_id = 2, 0
    proto.trainer_spec.eos_id, proto.trainer_spec.bos_id = 1, -1
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = True
    (base / "spiece.model").write_bytes(proto.SerializeToString())
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 2, "chat_template": TEMPLATE}
    _edit(base, "tokenizer_config.json", **config)
    _edit(base, "config.json", model_type="t5")
    if find_spec("sentencepiece") is None:  # no dependency of ours
        with pytest.raises(MissingDependencyError, match=r"in spiece\.model alone"):
            _written(base, tmp_path / "stage")
        return
    said = _written(base, tmp_path / "stage")
    assert "written anew" in said[0]
    _assert_alike(Tokenizer(tmp_path / "stage"), _theirs(base))


def _edit(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**data, **changes}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False, "add_eos_token": True},
        {"add_bos_token": False, "add_prefix_space": True},
        {"additional_special_tokens": ["<tool>", "<é>"]},
        {"extra_special_tokens": {"image_token": "<image>"}},
        {"bos_token": {"__type": "AddedToken", "content": "<new>", "lstrip": True}},
        {"clean_up_tokenization_spaces": True},
        {"split_special_tokens": True},
        {"truncation_side": "left"},
        {"added_tokens_decoder": {"600": {"content": "<far>", "special": True}}},
    ],
    ids="-".join,
)
def test_what_the_config_says_is_done_as_transformers_does_it(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    KINDS[kind](tmp_path / "base")
    _edit(tmp_path / "base", "tokenizer_config.json", **changes)
    theirs = _theirs(tmp_path / "base")
    _written(tmp_path / "base", tmp_path / "stage")
    ours = Tokenizer(tmp_path / "stage")
    _assert_alike(ours, theirs)
    cut = theirs("Hello, world! Again.", truncation=True, max_length=6)["input_ids"]
    assert ours.encode_input("Hello, world! Again.", max_length=6).ids == cut


def test_files_of_old_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    _byte_level(tmp_path / "base")
    _edit(
        tmp_path / "base",
        "special_tokens_map.json",
        bos_token={"content": "<old>"},
        pad_token="<p>",
    )
    _edit(tmp_path / "base", "added_tokens.json", **{"<added>": 400})
    _written(tmp_path / "base", tmp_path / "stage")
    ours, theirs = Tokenizer(tmp_path / "stage"), _theirs(tmp_path / "base")
    _assert_alike(ours, theirs)
    assert ours.encode("a<added>b<old>") == theirs("a<added>b<old>")["input_ids"]


def test_the_files_are_the_bases_own_where_they_say_the_same(tmp_path: Path) -> None:
    _sentencepiece_bpe(tmp_path / "base")
    _edit(tmp_path / "base", "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert _written(tmp_path / "base", tmp_path / "stage") == []
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "stage" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


def test_a_base_without_a_tokenizer_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    assert (
        "no tokenizer: the bundle takes token ids"
        in _written(tmp_path / "base", tmp_path / "stage")[0]
    )


def test_a_tokenizer_that_is_python_is_told_of(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "vocab.txt").write_text(
        "\n".join(["<cls>", "<pad>", "<eos>", "<unk>", *"ACDE", "<mask>"])
    )
    _edit(base, "tokenizer_config.json", tokenizer_class="EsmTokenizer")
    _edit(base, "config.json", model_type="esm")
    said = _written(base, tmp_path / "stage")
    assert "EsmTokenizer) is written in Python" in said[0]
    assert not (tmp_path / "stage" / "tokenizer_config.json").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_bytes(b"\xff\xfe"),
        lambda path: path.write_text(path.read_text().replace('"BPE"', '"XYZ"')),
    ],
)
def test_a_damaged_tokenizer_stops_the_export(damage: Any, tmp_path: Path) -> None:
    _byte_level(tmp_path / "base")
    damage(tmp_path / "base" / "tokenizer.json")
    with pytest.raises(BaseModelError, match="tokenizer") as refused:
        _written(tmp_path / "base", tmp_path / "stage")
    assert "\n" not in str(refused.value)


# --- what adapters bring -------------------------------------------------------------------------


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A bundle's folder with the base's text files; the base itself is in ``base``."""
    _byte_level(tmp_path / "base")
    _written(tmp_path / "base", tmp_path / "stage")
    shutil.copyfile(tmp_path / "base" / "config.json", tmp_path / "stage" / "config.json")
    return tmp_path / "stage"


def _adapter(tmp_path: Path, name: str = "a", *, tokenizer: bool = True) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    if tokenizer:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tmp_path / "base" / file, folder / file)
    return folder


def _carried(stage: Path, folder: Path, **options: Any) -> tuple[Manifest, list[str]]:
    said: list[str] = []
    manifest = _manifest(stage, "a", **options)
    return write_adapter_texts(stage, manifest, {"a": folder}, said.append), said


def test_files_that_mean_the_same_are_not_carried(stage: Path, tmp_path: Path) -> None:
    folder = _adapter(tmp_path)
    _edit(folder, "tokenizer_config.json", transformers_version="4.0", name_or_path="x/y")
    _edit(folder, "tokenizer_config.json", model_max_length=7, padding_side="left")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["truncation"] = {
        "direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(data, indent=3))
    manifest, said = _carried(stage, folder)
    assert manifest.adapters["a"].text == ()
    assert not said
    assert not (stage / "adapters").exists()
    # As transformers saves it, which is another text.
    _theirs(tmp_path / "base").save_pretrained(tmp_path / "saved")
    assert _carried(stage, tmp_path / "saved")[0].adapters["a"].text == ()
    assert _carried(stage, _adapter(tmp_path, "none", tokenizer=False))[0].adapters["a"].text == ()


def test_added_tokens_are_carried(stage: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    theirs = _theirs(tmp_path / "base")
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    theirs.eos_token = "<|im_end|>"
    theirs.save_pretrained(folder)
    manifest, said = _carried(stage, folder)
    assert manifest.adapters["a"].text == ("tokenizer",)
    assert said == ["a brings its own tokenizer, used where it is used"]
    assert set(manifest.files) >= {
        "adapters/a/text/tokenizer.json", "adapters/a/text/tokenizer_config.json",
    }  # fmt: skip
    ours = Tokenizer(stage, stage / "adapters/a/text")
    _assert_alike(ours, _theirs(folder))
    assert len(ours.encode("<|im_start|>")) == 1
    assert len(Tokenizer(stage).encode("<|im_start|>")) > 1


@pytest.mark.parametrize("alone", [True, False])
def test_a_chat_template_is_carried(alone: bool, stage: Path, tmp_path: Path) -> None:
    folder = _adapter(tmp_path, tokenizer=not alone)
    (folder / "chat_template.jinja").write_text("MINE {{ messages[0].content }}\n")
    manifest, _ = _carried(stage, folder)
    assert manifest.adapters["a"].text == ("chat_template",)
    assert [x.name for x in (stage / "adapters/a/text").iterdir()] == ["chat_template.jinja"]
    assert Tokenizer(stage, stage / "adapters/a/text").chat_text("x").startswith("MINE x")
    assert not Tokenizer(stage).chat_text("x").startswith("MINE")


def test_named_templates_are_carried(stage: Path, tmp_path: Path) -> None:
    folder = _adapter(tmp_path)
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    _edit(folder, "tokenizer_config.json", chat_template=named)
    _carried(stage, folder)
    ours = Tokenizer(stage, stage / "adapters/a/text")
    assert (ours.chat_text("x"), ours.chat_text("x", tools=[{}])) == ("D", "T")
    _edit(folder, "tokenizer_config.json", chat_template=[{"name": "../../x", "template": "D"}])
    with pytest.raises(AdapterError, match="template"):
        _carried(stage, folder)


def test_tokens_without_a_row_are_refused_by_name(stage: Path, tmp_path: Path) -> None:
    theirs = _theirs(tmp_path / "base")
    rows = len(theirs)
    theirs.add_tokens(["<new>", "<newer>"])
    theirs.save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match=f"2 tokens beyond .* of {rows}: '<new>', '<newer>'"):
        _carried(stage, tmp_path / "a", rows=rows)
    assert _carried(stage, tmp_path / "a", rows=rows + 2)[0].adapters["a"].text == ("tokenizer",)


def test_a_padding_token_without_a_row_is_told_of(stage: Path, tmp_path: Path) -> None:
    theirs = _theirs(tmp_path / "base")
    rows = len(theirs)
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    theirs.save_pretrained(tmp_path / "a")
    manifest, said = _carried(stage, tmp_path / "a", rows=rows)
    assert "'[PAD]' has no row" in said[0]
    assert manifest.adapters["a"].text == ("tokenizer",)


def test_a_merged_bundle_has_its_adapters_text(stage: Path, tmp_path: Path) -> None:
    theirs = _theirs(tmp_path / "base")
    theirs.add_special_tokens({"eos_token": "<|im_end|>"})
    theirs.chat_template = "MERGED {{ messages[0].content }}{{ eos_token }}"
    theirs.save_pretrained(tmp_path / "a")
    manifest, _ = _carried(stage, tmp_path / "a", mode="merged")
    assert manifest.adapters["a"].text == ("tokenizer", "chat_template")
    assert Tokenizer(stage).chat_text("x") == "MERGED x<|im_end|>"
    _assert_alike(Tokenizer(stage), theirs)
    assert not (stage / "adapters").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer_config.json", b"\xff"),
        ("chat_template.jinja", b"\xff"),
        ("tokenizer_config.json", b'{"chat_template": 7}'),
    ],
)
def test_damaged_files_of_an_adapter_are_named(
    file: str, content: bytes, stage: Path, tmp_path: Path
) -> None:
    folder = _adapter(tmp_path)
    (folder / file).write_bytes(content)
    with pytest.raises(AdapterError) as refused:
        _carried(stage, folder)
    assert "\n" not in str(refused.value)


def test_without_transformers_what_cannot_be_told_is_refused(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lora_edge.base.tokenizer", None)
    assert _carried(stage, _adapter(tmp_path))[0].adapters["a"].text == ()
    other = _adapter(tmp_path, "other")
    _edit(other, "tokenizer_config.json", bos_token="<x>")
    with pytest.raises(MissingDependencyError, match="a brings its own tokenizer"):
        _carried(stage, other)
