"""The record of a training, read: its schema, and each setting's type and range."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_edge.errors import LoraEdgeError
from lora_edge.training.record import read_recipe
from tests.support.paths import ROOT

ECHO = ROOT / "models" / "adapters" / "echo" / "training.json"


def test_a_byte_order_mark_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "training.json"
    file.write_bytes(b"\xef\xbb\xbf" + ECHO.read_bytes())
    assert read_recipe(file) == read_recipe(ECHO)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": 3}, "base is 3, expected a text"),
        ({"data": []}, "data is"),
        ({"data": {"sha256": None}}, "data.sha256 is None"),
        ({"settings": "all"}, "settings is 'all'"),
        ({"settings": {"rank": "8"}}, "rank is '8'"),
        ({"settings": {"dora": "yes"}}, "dora is 'yes', expected true or false"),
        ({"settings": {"alpha": None}}, "alpha is None"),
        ({"settings": {"target_modules": 3}}, "target_modules is 3"),
        ({"settings": {"layers": [[]]}}, r"layers\[0\]"),
        ({"settings": {"rank_pattern": {"q": []}}}, "rank_pattern.q"),
        ({"settings": {"seed": 1.5}}, "seed is 1.5"),
        ({"settings": {"dropout": 3.0}}, "dropout is 3.0"),
        ({"versions": []}, "versions is"),
        ({"result": 3}, "result is 3"),
        ({"evaluation": "x"}, "evaluation is 'x'"),
    ],
)
def test_a_value_outside_its_schema_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    file = tmp_path / "training.json"
    file.write_text(json.dumps({**json.loads(ECHO.read_text()), **changes}))
    with pytest.raises(LoraEdgeError, match=words) as caught:
        read_recipe(file)
    assert caught.value.hint


@pytest.mark.parametrize(
    "content", [b"", b"[" * 100_000, b"\xff", b"[]", b'{"base": 1, "base": 2}']
)
def test_what_is_no_record_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "training.json"
    file.write_bytes(content)
    with pytest.raises(LoraEdgeError, match=r"training\.json"):
        read_recipe(file)
