"""The runner's rendering against transformers' apply_chat_template, template by template.

The templates are written in the shapes of those that public models use.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_edge.errors import DataError
from lora_edge.runtime.text.chat import ChatTemplates
from lora_edge.runtime.text.corpus import CONTEXTS, CONVERSATIONS, DOCUMENTS, TOOLS
from lora_edge.runtime.text.tokenizer import Tokenizer

TEMPLATES = sorted((Path(__file__).parent / "templates").glob("*.jinja"))
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "cls_token": "<user>",
    "image_token": "<assistant>",
    "additional_special_tokens": ["<user>"],
    "add_bos_token": True,
    "model_max_length": 100,
}


@pytest.fixture(scope="module")
def folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    bundle = tiny.bundle(made / "bundle", "fused")
    (made / "tokenizer.json").write_text((bundle.directory / "tokenizer.json").read_text())
    (made / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return made


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _rendered(theirs: Any, messages: Any, **options: Any) -> str | None:
    try:
        return str(theirs.apply_chat_template(messages, tokenize=False, **options))
    except Exception:  # noqa: BLE001 - a template raises what it likes
        return None


def _ours(templates: ChatTemplates, messages: Any, **options: Any) -> str | None:
    try:
        return templates.render(messages, **options)
    except DataError:
        return None


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_every_template_renders_as_transformers_does(file: Path, theirs: Any, folder: Path) -> None:
    source = file.read_text(encoding="utf-8")
    templates = ChatTemplates({"default": source}, Tokenizer(folder).special_tokens, "x")
    rendered = 0
    for messages in CONVERSATIONS:
        for context in CONTEXTS:
            for opened in (True, False):
                options = {**context, "add_generation_prompt": opened}
                expected = _rendered(theirs, messages, chat_template=source, **options)
                found = _ours(templates, messages, **options)
                assert found == expected, (messages, options)
                rendered += expected is not None
    assert rendered >= 8  # both refusing proves little


def test_the_corpus_is_large_enough_and_its_templates_differ() -> None:
    assert len({file.read_text() for file in TEMPLATES}) >= 25


def test_what_a_template_is_given_is_what_transformers_gives(theirs: Any, folder: Path) -> None:
    names = "messages tools documents add_generation_prompt bos_token eos_token unk_token "
    names += "pad_token sep_token cls_token mask_token image_token additional_special_tokens "
    names += "extra_special_tokens range dict lipsum cycler joiner namespace raise_exception "
    names += "strftime_now custom_tools enable_thinking add_bos_token loop self"
    source = "".join(
        f"{name}:{{{{ {name} is defined }}}}{{{{ {name} is none }}}}" for name in names.split()
    )
    templates = ChatTemplates({"default": source}, Tokenizer(folder).special_tokens, "x")
    for context in CONTEXTS:
        expected = _rendered(theirs, CONVERSATIONS[0], chat_template=source, **context)
        assert (
            templates.render(CONVERSATIONS[0], add_generation_prompt=False, **context) == expected
        )


class _Role(str, enum.Enum):
    USER = "user"


@dataclasses.dataclass
class _Part:
    text: str
    size: int


def test_data_of_other_types_is_plain_as_in_transformers(theirs: Any) -> None:
    source = "{{ messages }}{{ messages[0].role }}{{ tools }}"
    message = {
        "role": _Role.USER,
        "content": [
            np.float32(0.5),
            np.bool_(False),
            (1, 2),
            _Part("a", 3),
            np.zeros(2),
            {1: None},
        ],
        "flag": True,
        "nothing": None,
    }
    found = ChatTemplates({"default": source}, {}, "x").render([message])
    assert found == theirs.apply_chat_template(
        [message], tokenize=False, chat_template=source, add_generation_prompt=True
    )


def test_named_templates_are_found_and_chosen_as_in_transformers(
    folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    def compare(at: Path) -> None:
        ours, theirs = Tokenizer(at), AutoTokenizer.from_pretrained(at, local_files_only=True)
        for context in CONTEXTS:
            expected = _rendered(theirs, CONVERSATIONS[0], **context)
            if expected is None:
                with pytest.raises(DataError):
                    ours.chat_text(CONVERSATIONS[0], add_generation_prompt=False, **context)
            else:
                found = ours.chat_text(CONVERSATIONS[0], add_generation_prompt=False, **context)
                assert found == expected

    def model(name: str, template: Any = None, **files: str) -> Path:
        at = tmp_path / name
        (at / "additional_chat_templates").mkdir(parents=True)
        (at / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
        config = CONFIG if template is None else {**CONFIG, "chat_template": template}
        (at / "tokenizer_config.json").write_text(json.dumps(config))
        for file, text in files.items():
            path = "chat_template" if file == "main" else f"additional_chat_templates/{file}"
            (at / f"{path}.jinja").write_text(text, encoding="utf-8")
        return at

    named = [{"name": "default", "template": "D{{ tools }}"}, {"name": "tool_use", "template": "T"}]
    compare(model("one", "one"))
    compare(model("list", named))
    compare(model("dict", {"default": "a", "tool_use": "b"}))
    compare(model("nodefault", [{"name": "rag", "template": "R"}]))
    compare(model("file", "config", main="file"))
    compare(model("files", named, main="file", rag="rag"))
    compare(model("tools", named, main="file", tool_use="tools"))
    compare(model("only", named, tool_use="tools"))
    compare(model("mark", main="\ufeffwith a byte order mark"))
    compare(model("none"))


def test_the_prompt_that_train_renders_is_the_one_that_the_runner_renders(
    theirs: Any, folder: Path
) -> None:
    from lora_edge.training.data import ChatExample
    from lora_edge.training.tokens import _rendered as trained

    source = "{% if tools is not none %}TOOLS {% endif %}" + TEMPLATES[0].read_text()
    theirs.chat_template = source
    try:
        example = ChatExample((("user", "Grüße"), ("assistant", "b"), ("user", "c")), "x")
        ids = trained(example, 3, theirs, opened=True)
    finally:
        theirs.chat_template = None
    ours = Tokenizer(folder)
    ours.__dict__["templates"] = {"default": source}
    messages = [{"role": role, "content": text} for role, text in example.messages]
    assert ours.encode_chat(messages) == ids


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "expected a text or a list"),
        (7, "expected a text or a list"),
        ([{"role": "user"}], "expected a mapping with role and content"),
        (["hi"], "expected a mapping"),
    ],
)
def test_what_is_no_conversation(messages: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        ChatTemplates({"default": "x"}, {}, "x").render(messages)


def test_tools_and_documents_are_mappings() -> None:
    templates = ChatTemplates({"default": "{{ tools | length }}"}, {}, "x")
    assert templates.render("hi", tools=TOOLS, documents=DOCUMENTS) == "1"
    with pytest.raises(DataError, match="tools hold function"):
        templates.render("hi", tools=[test_what_is_no_conversation])  # type: ignore[list-item]


def test_a_conversation_as_long_as_a_context_is_rendered() -> None:
    source = (Path(__file__).parent / "templates" / "qwen3.jinja").read_text()
    messages = [
        {"role": role, "content": "word " * 500}
        for _ in range(400)
        for role in ("user", "assistant")
    ]
    text = ChatTemplates({"default": source}, {}, "x").render(messages)
    assert len(text) > 2_000_000
    assert sys.getsizeof(text) < 10_000_000
