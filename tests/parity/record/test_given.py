"""The user's own prompts as golden cases."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora_edge.bundle.bundle import file_entries, load_bundle
from lora_edge.bundle.onnx_adapter import read_adapter, write_adapter
from lora_edge.errors import DataError, ParityError
from lora_edge.parity import add_goldens, validate
from lora_edge.parity.plan.examples import Prompt, read_prompts
from lora_edge.parity.record.golden import recorded
from tests.support import shipped

PROMPTS = [Prompt("Word: river Answer:"), Prompt("Word: stone Answer:", "echo")]


@pytest.fixture
def bundle(shipped_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shipped_bundle, tmp_path / "bundle"))


def test_they_are_run_from_then_on(bundle: Path) -> None:
    before = validate(bundle, depth="quick")
    add_goldens(bundle, PROMPTS, shipped.BASE, steps=4)
    load_bundle(bundle).verify_all()
    given = {g.probe.name: g for g in recorded(load_bundle(bundle)) if g.probe.given}
    assert {name: len(golden.probe.rows) for name, golden in given.items()} == {
        "base, given prompts 1": 1,
        "adapter echo, given prompts 1": 2,
        "adapter mirror, given prompts 1": 1,
    }
    after = validate(bundle, depth="quick")
    assert after.passed, after.table()
    assert {case.name for case in after.cases} == {case.name for case in before.cases} | set(given)
    live = validate(bundle, shipped.BASE, depth="quick", steps=4)
    assert live.passed, live.table()
    assert set(given) <= {case.name for case in live.cases}
    # They stay what they were, and more can be added.
    add_goldens(bundle, [Prompt("Word: apple Answer:", "echo")], shipped.BASE, steps=2)
    names = {g.probe.name for g in recorded(load_bundle(bundle)) if g.probe.given}
    assert names == set(given) | {"adapter echo, given prompts 2"}
    assert validate(bundle, depth="quick").passed


def test_a_fault_that_shows_on_them_is_found(bundle: Path) -> None:
    add_goldens(bundle, PROMPTS, shipped.BASE, steps=4)
    loaded = load_bundle(bundle)
    file = bundle / loaded.adapter("mirror").file
    tensors = read_adapter(file)
    doubled = {k: v * np.float32(2 if k.endswith(".B") else 1) for k, v in tensors.items()}
    write_adapter(file, doubled)
    loaded.write_manifest(replace(loaded.manifest, files=file_entries(bundle)))
    failed = {case.name for case in validate(bundle, depth="quick").failures}
    assert "adapter mirror, given prompts 1" in failed
    assert "adapter echo, given prompts 1" not in failed
    before = load_bundle(bundle).manifest
    with pytest.raises(ParityError, match="mirror"):
        add_goldens(bundle, PROMPTS, shipped.BASE, steps=4)
    assert load_bundle(bundle).manifest == before


def test_prompts_from_files(tmp_path: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text("Dear Sir\n\nDear Madam\n")
    assert read_prompts(text) == [Prompt("Dear Sir"), Prompt("Dear Madam")]
    lines = tmp_path / "prompts.jsonl"
    # JSON holds signs that end a line elsewhere; a byte order mark is no fault.
    lines.write_text('\ufeff{"prompt": "a\u2028b\x85c"}\r\n', encoding="utf-8")
    assert read_prompts(lines) == [Prompt("a\u2028b\x85c")]
    lines.write_text('{"prompt": "a"}\n{"prompt": "b", "adapter": "echo"}\n')
    assert read_prompts(lines) == [Prompt("a"), Prompt("b", "echo")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "jsonl:2: "),
        ("a.jsonl", b"not json\n", "jsonl:1: "),
        ("a.txt", b"\n\n", "no prompt"),
        ("a.jsonl", b'{"prompt": "a\\ud800b"}\n', "jsonl:1: "),
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
        ("missing.txt", None, "cannot be read"),
    ],
)
def test_files_that_hold_none(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_prompts(tmp_path / name)


def test_prompts_that_the_bundle_cannot_run(bundle: Path) -> None:
    with pytest.raises(DataError, match="'nobody'"):
        add_goldens(bundle, [Prompt("a", "nobody")], shipped.BASE)
    with pytest.raises(DataError, match="tokens, expected 1 to"):
        add_goldens(bundle, [Prompt("word " * 2000)], shipped.BASE)
