from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_edge.errors import BundleError, DataError
from lora_edge.runtime.text.defaults import read_defaults
from lora_edge.runtime.text.tokenizer import Tokenizer

BOS, USER, ASSISTANT = 257, 258, 259


@pytest.fixture
def folder(tiny: Any, tmp_path: Path) -> Path:
    return Path(tiny.bundle(tmp_path / "model", "fused").directory)


def test_round_trip_with_the_tokenizers_own_special_tokens(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode("é漢 x")
    assert ids[0] == BOS
    assert len(ids) == 1 + len("é漢 x".encode())
    assert tokenizer.encode("é漢 x", special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids) == "é漢 x"
    assert tokenizer.vocab_size == 260


def test_saved_truncation_and_padding_are_not_applied(folder: Path) -> None:
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    data["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path.write_text(json.dumps(data))
    assert len(Tokenizer(folder).encode("abcdef")) == 7


def test_chat_of_a_text_and_of_messages(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    assert tokenizer.chat_text("hi") == "<bos><user>hi<assistant>"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<b>"}]
    assert tokenizer.chat_text(messages) == "<bos><user>hi<assistant><b><assistant>"
    ids = tokenizer.encode_chat("hi")
    assert ids[:2] == [BOS, USER]  # the template's own beginning, not a second one
    assert ids[-1] == ASSISTANT
    assert len(ids) == 5


def test_templates_where_tokenizer_config_has_them(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    config = folder / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m | tojson }}{% if loop.first %}{% continue %}{% endif %}"
    template += "!{% endfor %}{{ eos_token }}"
    text = '{"role": "user", "content": "<é>"}</s>'
    config.write_text(json.dumps({"chat_template": template, "eos_token": "</s>"}))
    assert Tokenizer(folder).chat_text("<é>") == text
    several = [{"name": "tool", "template": "x"}, {"name": "default", "template": template}]
    config.write_text(json.dumps({"chat_template": several, "eos_token": "</s>"}))
    assert Tokenizer(folder).chat_text("<é>") == text
    config.write_text("{}")
    with pytest.raises(DataError, match="has no chat template"):
        Tokenizer(folder).chat_text("hi")


def test_a_template_may_refuse_and_may_not_reach_outside(folder: Path) -> None:
    with pytest.raises(DataError, match="no system role"):
        Tokenizer(folder).chat_text([{"role": "system", "content": "x"}])
    template = folder / "chat_template.jinja"
    for attack in (
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ ().__class__.__bases__[0].__subclasses__() }}",
    ):
        template.write_text(attack)
        with pytest.raises(DataError, match="refuses the messages"):
            Tokenizer(folder).chat_text("hi")
    template.write_text("{% for %}")
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer(folder).chat_text("hi")


@pytest.mark.parametrize("bad", [{"role": "user"}, "hello", {"content": "x"}])
def test_messages_need_role_and_content(folder: Path, bad: Any) -> None:
    with pytest.raises(DataError, match="expected a mapping with role and content"):
        Tokenizer(folder).chat_text([bad])


def test_missing_and_damaged_files(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(BundleError, match="is not a JSON object"):
        Tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"has no tokenizer\.json"):
        Tokenizer(folder)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ('{"eos_token_id": [5, 7]}', '{"eos_token_id": 1}', {5, 7}),
        ('{"eos_token_id": 5}', None, {5}),
        ("{}", '{"eos_token_id": 0}', set()),  # as transformers: the file alone counts
        (None, '{"eos_token_id": 0}', {0}),
        (None, '{"eos_token_id": null}', set()),
        (None, None, set()),
    ],
)
def test_end_tokens(
    tmp_path: Path, generation: str | None, config: str | None, expected: set[int]
) -> None:
    for name, text in (("generation_config.json", generation), ("config.json", config)):
        if text is not None:
            (tmp_path / name).write_text(text)
    assert read_defaults(tmp_path).eos_ids == expected


def _processor(**changes: Any) -> Any:
    return lambda data: data["post_processor"].update(changes)


def _part(**changes: Any) -> Any:
    return lambda data: data.update(changes)


DAMAGE = {
    "a special token that is not there": _processor(special_tokens={}),
    "a name that is not there": _processor(single=[{"SpecialToken": {"id": "x", "type_id": 0}}]),
    "an empty processor": _part(post_processor={"type": "Sequence", "processors": [{}]}),
    "half a processor": _part(post_processor={"type": "BertProcessing", "sep": ["[SEP]"]}),
    "no vocabulary": lambda data: data["model"].update(type="Unigram", vocab=[], unk_id=5),
    "no such decoder": _part(decoder={"type": "Nothing"}),
    "no regex": _part(normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": ""}),
    "no charsmap": _part(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_tokenizer_is_a_refusal_of_one_line(
    folder: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    DAMAGE[name](data)
    path.write_text(json.dumps(data))
    with pytest.raises(BundleError) as refused:
        Tokenizer(folder)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500
    assert refused.value.hint
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", None, 7, b"a"])
def test_what_is_no_text(folder: Path, text: Any) -> None:
    tokenizer = Tokenizer(folder)
    with pytest.raises(DataError):
        tokenizer.encode(text)
    with pytest.raises(DataError):
        tokenizer.encode_input("a", 7 if text is None else text)
    if isinstance(text, str):
        with pytest.raises(DataError):
            tokenizer.encode_chat([{"role": "user", "content": text}])
