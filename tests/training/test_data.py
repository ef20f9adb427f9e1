"""Reading and tokenizing: what carries loss, and every refused line with its file and number."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_edge.errors import DataError
from lora_edge.training.data import IGNORED, Example, read_data, tokenize

GOOD = b'{"prompt": "a", "completion": "b"}\n'


@pytest.fixture(scope="module")
def tokenizer() -> object:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "models" / "tiny-llama")


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
    assert [(e.prompt, e.completion) for e in read.examples] == [("p", "c"), ("a", "b")]
    assert read.examples[1].where.endswith("data.jsonl:3")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", "completion": "b"', r":2: not JSON"),
        (b'{"prompt": "\xff", "completion": "b"}', r":2: not UTF-8 \(byte 13"),
        (b'["a", "b"]', r":2: expected a JSON object, got list"),
        (b'{"text": "a"}', r":2: expected the keys 'prompt' and 'completion', got 'text'"),
        (b'{"prompt": "a", "response": "b"}', r"got 'prompt', 'response'"),
        (b'{"prompt": "a", "completion": 3}', r":2: 'completion' is int, expected a text"),
        (b'{"prompt": "a", "completion": ""}', r":2: 'completion' is empty"),
        (b'{"prompt": "\\ud800", "completion": "b"}', r":2: 'prompt' holds a lone surrogate"),
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
