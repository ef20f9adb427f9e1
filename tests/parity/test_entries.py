"""What a manifest says of its adapters is held against their PEFT files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora_edge.bundle.bundle import load_bundle
from lora_edge.parity.entries import check_entries, contradiction


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("invocation", [3], "activated by the tokens 3, its PEFT config that it is active from"),
        ("alone", "DoRA", "rooted cannot be blended, its PEFT files that it can"),
        ("digest", "0" * 64, "digest of rooted is not that"),
        ("kind", "dora", "rooted is dora, its PEFT files rsLoRA"),
        ("ranks", {}, "ranks of rooted are not those"),
    ],
)
def test_an_entry_that_its_files_deny(
    made: Any, tmp_path: Path, field: str, value: object, words: str
) -> None:
    directory = Path(shutil.copytree(made.switchable["fused"], tmp_path / "out"))
    assert check_entries(load_bundle(directory)) == []
    path = directory / "lora_edge.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["adapters"]["rooted"][field] = value
    path.write_text(json.dumps(data), encoding="utf-8")
    bundle = load_bundle(directory)
    (case,) = check_entries(bundle)
    assert (case.adapters, case.status) == (("rooted",), "failed")
    assert words in case.reason
    assert contradiction(bundle, ["narrow"]) == ""
    shutil.rmtree(directory / "adapters" / "rooted" / "peft")
    assert check_entries(bundle) == []  # nothing to hold it against


def test_a_merged_bundle_has_nothing_to_say(made: Any) -> None:
    assert check_entries(load_bundle(made.merged)) == []
