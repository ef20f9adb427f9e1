"""A validation that was cut off, whose folder was damaged: an error, never a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_edge.errors import DataError
from lora_edge.parity.case import Case
from lora_edge.parity.record.journal import Journal

KEY = {"seed": 0}
CASE = Case("base", (), "passed", session="cpu, all")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Journal(tmp_path / "journal", KEY).finish("cpu, all", "base", [CASE])
    return tmp_path / "journal"


def _line(folder: Path, **changes: Any) -> None:
    file = folder / "finished.jsonl"
    part = json.loads(file.read_text())
    case = {**part["cases"][0], **changes.pop("case", {})}
    file.write_text(json.dumps({**part, "cases": [case], **changes}) + "\n")


def test_it_goes_on(folder: Path) -> None:
    assert Journal(folder, KEY).finished("cpu, all", "base") == [CASE]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"session": 3}, "session is 3"),
        ({"cases": None}, "cases is None"),
        ({"golden": "../../x.npz"}, "a relative path"),
        ({"golden": "/etc/passwd"}, "a relative path"),
        ({"case": {"status": "good"}}, r"cases\[0\].status is 'good'"),
        ({"case": {"figures": []}}, r"cases\[0\].figures is \[\]"),
        ({"case": {"figures": {"positions": 1}}}, r"cases\[0\].figures.\w+ is missing"),
        ({"case": {"layers": [{"path": 1}]}}, r"layers\[0\]"),
        ({"case": {"colour": 1}}, "colour is no field"),
    ],
)
def test_a_damaged_part_is_an_error(changes: dict[str, Any], words: str, folder: Path) -> None:
    _line(folder, **changes)
    with pytest.raises(DataError, match=words):
        Journal(folder, KEY)


@pytest.mark.parametrize("line", [b"[]", b"[" * 100_000, b"\xff", b"null", b"{"])
def test_a_line_that_is_no_object_is_an_error(line: bytes, folder: Path) -> None:
    (folder / "finished.jsonl").write_bytes(line + b"\n")
    with pytest.raises(DataError, match=r"finished\.jsonl"):
        Journal(folder, KEY)
