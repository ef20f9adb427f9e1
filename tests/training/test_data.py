"""Reading and tokenizing: what carries loss, and every refused line with its file and number."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_edge.errors import DataError
from lora_edge.training.data import ChatExample, Example, read_data
from lora_edge.training.tokens import IGNORED, TokenizedExample, pack, tokenize
from tests.support.paths import ROOT

GOOD = b'{"prompt": "a", "completion": "b"}\n'


@pytest.fixture(scope="module")
def tokenizer() -> object:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "models" / "tiny-llama")


def write(directory: Path, content: bytes) -> Path:
    path = directory / "data.jsonl"
    path.write_bytes(content)
    return path


def test_labels_cover_the_completion_and_the_end_token(tokenizer: object) -> None:
    (made,) = tokenize([Example("ab", " cé", "here:1")], tokenizer, 64)
    prompt = tuple(tokenizer("ab")["input_ids"])  # type: ignore[operator]
    end = tokenizer.eos_token_id  # type: ignore[attr-defined]
    assert made.input_ids[: len(prompt)] == prompt
    assert made.labels[: len(prompt)] == (IGNORED,) * len(prompt)
    assert made.labels[len(prompt) :] == made.input_ids[len(prompt) :]
    assert made.labels[-1] == end
    assert made.targets == len(" cé".encode()) + 1


def test_a_long_example_is_cut_and_one_without_a_target_is_refused(tokenizer: object) -> None:
    (made,) = tokenize([Example("ab", "cdef", "here:1")], tokenizer, 5)
    assert (len(made.input_ids), made.targets, made.cut) == (5, 2, 3)
    with pytest.raises(DataError, match=r"here:7: no token of the completion is left within 5"):
        tokenize([Example("abcd", "e", "here:7")], tokenizer, 5)


def test_a_boundary_that_the_tokenizer_joins_is_refused() -> None:
    merging = SimpleNamespace(eos_token_id=9, eos_token="</s>")
    call = lambda text, **_: {"input_ids": [5] if text == "ab" else [1, *range(len(text) - 1)]}  # noqa: E731
    joined = type("Joined", (), {**vars(merging), "__call__": staticmethod(call)})()
    with pytest.raises(DataError, match=r"f:2: the tokenizer joins the end of the prompt"):
        tokenize([Example("a", "b", "f:2")], joined, 8)
    tokenize([Example("a", "bc", "f:3")], joined, 8)  # control: this one is not joined


def test_a_tokenizer_that_ends_every_text_by_itself_ends_it_once() -> None:
    call = lambda text, **_: {"input_ids": [*text.encode(), 9]}  # noqa: E731
    ending = type(
        "Ending", (), {"eos_token_id": 9, "eos_token": "</s>", "__call__": staticmethod(call)}
    )()
    (made,) = tokenize([Example("a", "b", "f:1")], ending, 8)
    assert made.input_ids == (97, 98, 9)
    assert made.labels == (IGNORED, 98, 9)


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    with pytest.raises(DataError, match="no end token"):
        tokenize([Example("a", "b", "f:1")], SimpleNamespace(eos_token_id=None), 8)


def test_blank_lines_other_keys_a_byte_order_mark_and_crlf_are_read(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"prompt": "p", "completion": "c", "id": 3}\r\n\r\n' + GOOD
    read = read_data(write(tmp_path, content))
    assert [(e.prompt, e.completion) for e in read.rows] == [("p", "c"), ("a", "b")]
    assert read.rows[1].where.endswith("data.jsonl:3")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", "completion": "b"', r":2: the line is not JSON"),
        (b'{"prompt": "\xff", "completion": "b"}', r":2: the line is not UTF-8: byte 12"),
        (b'["a", "b"]', r":2: the line is not a JSON object"),
        (b'{"text": "a"}', r":2: expected the keys 'prompt' and 'completion', got 'text'"),
        (b'{"prompt": "a", "response": "b"}', r"got 'prompt', 'response'"),
        (b'{"prompt": "a", "completion": 3}', r":2: 'completion' is int, expected a text"),
        (b'{"prompt": "a", "completion": ""}', r":2: 'completion' is empty"),
        (b'{"prompt": "\\ud800", "completion": "b"}', r":2: .*lone surrogate"),
        (b"[" * 100_000, r":2: "),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_data(write(tmp_path, GOOD + line + b"\n" + GOOD))
    assert "prompt" in caught.value.hint


def test_several_bad_lines_are_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r":1: .* \(and 2 more bad lines\)"):
        read_data(write(tmp_path, b"x\ny\n" + GOOD + b"z\n"))


@pytest.mark.parametrize("content", [b"", b"\n  \n", b"\xef\xbb\xbf"])
def test_a_file_without_examples_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match="holds no examples"):
        read_data(write(tmp_path, content))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            read_data(path)


def test_a_csv_file_is_read_like_a_jsonl_file(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    rows = ["\ufeffid,prompt,completion", '1,"a, b",c', "", '2,"two\nlines",é', ""]
    path.write_bytes("\r\n".join(rows).encode())
    read = read_data(path)
    assert read.kind == "pair"
    assert [(e.prompt, e.completion) for e in read.rows] == [("a, b", "c"), ("two\nlines", "é")]
    assert [e.where.rpartition(":")[2] for e in read.rows] == ["2", "4"]
    path.write_text("text,label\na,10\nb,9\n")
    assert read_data(path).labels == ("9", "10")
    path.write_text("text,label\na,10\nb,x\n")
    assert read_data(path).labels == ("10", "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prompt,completion\na\n", r":2: 1 cells, expected 2"),
        (b"prompt,answer\na,b\n", r":1: expected the columns 'messages' or .*\['prompt', 'answer'"),
        (b"prompt,completion\na,\n", r":2: 'completion' is empty"),
        (b"prompt,completion\na,b\nc,\xff\n", r":3: not UTF-8 \(byte 3 of the line\)"),
        (b'prompt,completion\na,"b\n', r":2: not csv: unexpected end of data"),
        (b"messages\n[1\n", r":2: 'messages' is not JSON"),
        (b"", "holds no examples"),
        (b"prompt,completion\n", "holds no examples"),
    ],
)
def test_a_bad_csv_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_data(path)


def test_plain_text_is_learnt_whole(tmp_path: Path, tokenizer: object) -> None:
    read = read_data(write(tmp_path, b'{"text": "abc"}\n'))
    assert read.kind == "text"
    (made,) = tokenize(read.rows, tokenizer, 64)
    assert made.labels == (IGNORED, *made.input_ids[1:])
    assert made.targets == len(made.input_ids) - 1


TURNS = (("user", "ab"), ("assistant", "cde"), ("user", "f"), ("assistant", "gh"))


def test_only_what_the_assistant_says_carries_loss(tokenizer: object) -> None:
    (made,) = tokenize([ChatExample(TURNS, "f:1")], tokenizer, 64)
    whole = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
        [{"role": role, "content": text} for role, text in TURNS], tokenize=False
    )
    coded = tokenizer(whole, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    end = tokenizer.eos_token_id  # type: ignore[attr-defined]
    assert list(made.input_ids) == [*coded, end]  # this template closes turns otherwise
    runs = [
        [label for _, label in group]
        for said, group in itertools.groupby(
            zip(made.input_ids, made.labels, strict=True), lambda pair: pair[1] != IGNORED
        )
        if said
    ]
    assert [tokenizer.decode(run) for run in runs] == [  # type: ignore[attr-defined]
        "cde<|end|>",
        "gh<|end|>" + tokenizer.eos_token,  # type: ignore[attr-defined]
    ]


def test_a_chat_that_the_template_rewrites_or_refuses_is_refused(tokenizer: Any) -> None:
    forgetful = copy.copy(tokenizer)
    forgetful.chat_template = (
        "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}{{ m.content }}"
        "{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"f:1: the chat template writes message 1 otherwise"):
        tokenize([ChatExample(TURNS, "f:1")], forgetful, 64)
    forgetful.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match=r"f:2: the chat template refuses .*: no system role"):
        tokenize([ChatExample(TURNS, "f:2")], forgetful, 64)
    forgetful.chat_template = None
    with pytest.raises(DataError, match=r"f:3: .* no chat template"):
        tokenize([ChatExample(TURNS, "f:3")], forgetful, 64)


def test_what_a_template_puts_after_the_end_token_is_not_learnt(tokenizer: Any) -> None:
    spaced = copy.copy(tokenizer)
    spaced.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    spaced.eos_token = "<|end|>"
    (made,) = tokenize([ChatExample(TURNS[:2], "f:1")], spaced, 64)
    assert made.labels[-1] == IGNORED
    assert made.labels[-2] == made.input_ids[-2] == spaced.eos_token_id


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"messages": []}', "not a list of turns, or an empty one"),
        (b'{"messages": ["a"]}', "message 0 is str, expected an object"),
        (b'{"messages": [{"role": "user"}]}', "message 0: expected the keys 'role' and 'content'"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "no turn of the role 'assistant'"),
        (b'{"messages": [{"role": "user", "content": ["a"]}]}', "'content' is list"),
    ],
)
def test_bad_chats_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_data(write(tmp_path, line))


def test_examples_without_a_target_are_left_out_when_asked(tokenizer: object) -> None:
    rows = [Example("ab", "c", "f:1"), Example("abcdefgh", "c", "f:2")]
    told: list[str] = []
    (made,) = tokenize(rows, tokenizer, 5, drop=told.append)
    assert made.targets == 2
    assert [line.partition(": ")[0] for line in told] == ["f:2"]
    with pytest.raises(DataError, match="no example is left within 5 tokens"):
        tokenize(rows[1:], tokenizer, 5, drop=told.append)


def test_an_unseen_label_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"text": "a", "label": "x"}\n{"text": "a", "label": "z"}\n')
    with pytest.raises(DataError, match=r":2: the label 'z' is not among those trained: x, y"):
        read_data(path, ("x", "y"))
    assert read_data(path, ("x", "z", "w")).labels == ("x", "z", "w")


@given(st.lists(st.integers(2, 9), min_size=1, max_size=30))
def test_packing_loses_nothing_and_overfills_nothing(sizes: list[int]) -> None:
    examples = [
        TokenizedExample(tuple([n] * size), (IGNORED, *[n] * (size - 1)), 0)
        for n, size in enumerate(sizes)
    ]
    rows = pack(examples, 9)
    assert sorted(part.input_ids for row in rows for part in row.parts) == sorted(
        example.input_ids for example in examples
    )
    assert all(len(row.input_ids) == len(row.labels) == len(row.positions) <= 9 for row in rows)
    assert all(row.positions[0] == 0 for row in rows)
    # No two rows could have been one: the packing is not the trivial one.
    shortest = sorted(len(row.input_ids) for row in rows)[:2]
    assert len(rows) == 1 or sum(shortest) > 9
