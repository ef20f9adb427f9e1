"""The one JSON reader: what it takes, and what it refuses by name."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from lora_edge.errors import AdapterError, BundleError, DataError
from lora_edge.files.json import (
    MAX_DEPTH,
    parse_json,
    parse_object,
    read_json,
    read_lines,
    read_object,
)

HINT = "Copy it again."


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        None,
        True,
        "é\U0001f600",
        {"a": [1, -2, 0.5, 1e300, None, {"b": "\\ud83d"}]},
        1000000000000000019884624838656,  # model_max_length, as transformers writes int(1e30)
    ],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_takes_json_with_and_without_a_byte_order_mark(value: object, mark: bytes) -> None:
    for ascii_only in (True, False):
        data = mark + json.dumps(value, ensure_ascii=ascii_only).encode()
        assert parse_json(data, "x.json", DataError, HINT) == value
        assert parse_json(data.decode(), "x.json", DataError, HINT) == value


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"{} {}", "not JSON"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8: byte 0"),
        (b'{"a": "\xff"}', "not UTF-8: byte 7"),
        (b'{"a": 1, "b": 2, "a": 1}', "key 'a' occurs twice"),
        (b'[{"x": {"y": 1, "\\u0079": 2}}]', "key 'y' occurs twice"),
        (b"[NaN]", "holds NaN"),
        (b"[-Infinity]", "holds -Infinity"),
        (b"[1e999]", "1e999 is too large"),
        (b"[" + b"9" * 5000 + b"]", "5000 digits"),
        (b'["\\ud800"]', "lone surrogate"),
        (b'{"\\udfff": 1}', "lone surrogate"),
        (b'{"a": [[["x\\uDc00"]]]}', "lone surrogate"),
        (b'"\\udc00"', "lone surrogate"),
        (b"[" * 100_000, "nested more than|not JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "nested more than"),
        (b'{"a":' * 100_000, "nested more than|not JSON"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested more than"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS pointer"),
    ],
)
def test_refuses_by_name(data: bytes, words: str) -> None:
    with pytest.raises(AdapterError, match=words) as caught:
        parse_json(data, "x.json", AdapterError, HINT)
    assert str(caught.value).startswith("x.json")
    assert caught.value.hint


def test_takes_as_much_nesting_as_it_says() -> None:
    data = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(data, "x", DataError, HINT) == json.loads(data)


def test_refuses_a_lone_surrogate_of_a_text() -> None:
    with pytest.raises(DataError, match="lone surrogate"):
        parse_json('["\udcff"]', "x", DataError, HINT)


def test_takes_infinity_where_it_is_asked_to() -> None:
    data = '{"time_step_limit": [0.0, Infinity], "x": -1e999}'
    parsed = parse_object(data, "config.json", DataError, HINT, nonfinite=True)
    assert parsed == json.loads(data)


def test_an_object_is_an_object(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a JSON object"):
        parse_object("[]", "x", DataError, HINT)
    file = tmp_path / "x.json"
    file.write_bytes(b"\xef\xbb\xbf{}")
    assert read_object(file, DataError, HINT) == {}
    assert read_lines(file, DataError, HINT) == [(1, "{}")]


def test_files_that_are_missing_too_long_or_no_files(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read: No such file"):
        read_json(tmp_path / "x.json", BundleError, HINT)
    with pytest.raises(BundleError, match="cannot be read"):
        read_json(tmp_path / "x\0.json", BundleError, HINT)
    with pytest.raises(BundleError, match="not a regular file"):
        read_json(tmp_path, BundleError, HINT)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(BundleError, match="not a regular file"):
        read_json(pipe, BundleError, HINT)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"\xef\xbb\xbf\n{}\r\n",))
    writer.start()
    assert read_lines(pipe, BundleError, HINT) == [(2, "{}")]
    writer.join()
    file = tmp_path / "long.json"
    file.write_bytes(b" " * 100)
    with pytest.raises(BundleError, match="longer than 50 bytes"):
        read_json(file, BundleError, HINT, max_bytes=50)
    with pytest.raises(BundleError, match="longer than 50 bytes"):
        parse_json(file.read_bytes(), "x", BundleError, HINT, max_bytes=50)
