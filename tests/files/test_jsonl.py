from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from lora_edge.errors import BundleError, DataError
from lora_edge.files.jsonl import read_jsonl, split_lines

HINT = 'Each line is like {"text": "..."}.'


def test_blank_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \r\n{"a": "\xe2\x80\xa8"}\n{"a": 3}')
    lines = read_jsonl(file, DataError, HINT)
    assert [line.where for line in lines] == [f"{file}:{number}" for number in (1, 4, 5)]
    objects = [line.object(DataError, HINT) for line in lines]
    assert objects == [{"a": 1}, {"a": "\u2028"}, {"a": 3}]
    assert list(split_lines(file.read_bytes(), file)) == lines


def test_a_pipe_is_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"\n{}\n",))
    writer.start()
    assert [line.where for line in read_jsonl(pipe, DataError, HINT)] == [f"{pipe}:2"]
    writer.join()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"a": 1', "the line is not JSON"),
        (b"[1]", "the line is not a JSON object"),
        (b'{"a": "\xff"}', "the line is not UTF-8: byte 7 is wrong"),
        (b'{"a": 1, "a": 2}', "the line is refused: the key 'a' occurs twice"),
        (b'{"a": NaN}', "the line is refused: it holds NaN"),
    ],
)
def test_an_error_names_file_line_fault_and_what_is_expected(
    tmp_path: Path, line: bytes, words: str
) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"a": 1}\n' + line + b"\n")
    good, bad = read_jsonl(file, BundleError, "Give a jsonl file.")
    assert good.object(BundleError, HINT) == {"a": 1}
    with pytest.raises(BundleError) as caught:
        bad.object(BundleError, HINT)
    assert str(caught.value).startswith(f"{file}:2: {words}")
    assert caught.value.hint == HINT


def test_infinity_is_taken_where_it_is_asked_for() -> None:
    (line,) = split_lines(b'{"loss": Infinity}', Path("x.jsonl"))
    assert line.object(DataError, HINT, nonfinite=True) == {"loss": float("inf")}


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(DataError, match="cannot be read") as caught:
            read_jsonl(path, DataError, "Give a jsonl file.")
        assert str(path) in str(caught.value)
        assert caught.value.hint == "Give a jsonl file."
