"""The schema of an adapter's config and record: PEFT's own types, anything else a refusal."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest

import lora_edge
from lora_edge.adapter.directory import read_config, read_training
from lora_edge.adapter.load import examine, load_adapter
from lora_edge.errors import AdapterError
from tests.support.paths import ROOT

SHOUT = ROOT / "models" / "adapters" / "shout"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHOUT, tmp_path / "shout"))


def _set(adapter: Path, name: str = "adapter_config.json", **fields: Any) -> None:
    file = adapter / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", []),
        ("peft_type", {"a": 1}),
        ("task_type", 3),
        ("base_model_name_or_path", ["x"]),
        ("r", "8"),
        ("r", 8.0),
        ("r", True),
        ("r", 0),
        ("r", 10**12),
        ("lora_alpha", "16"),
        ("lora_alpha", None),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("use_rslora", "false"),
        ("use_dora", 2),
        ("fan_in_fan_out", []),
        ("bias", []),
        ("init_lora_weights", {}),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", [["q_proj"]]),
        ("exclude_modules", 3),
        ("modules_to_save", "lm_head"),
        ("modules_to_save", [None]),
        ("rank_pattern", [1]),
        ("rank_pattern", {"q_proj": "8"}),
        ("rank_pattern", {"q_proj": -1}),
        ("alpha_pattern", "q_proj"),
        ("alpha_pattern", {"q_proj": None}),
        ("alora_invocation_tokens", "NaN"),
        ("alora_invocation_tokens", [1.5]),
        ("alora_invocation_tokens", [-1]),
        ("trainable_token_indices", {"embed_tokens": "x"}),
        ("trainable_token_indices", 3),
        ("target_parameters", "experts.down_proj"),
        ("layers_to_transform", "all"),
        ("layers_pattern", 1),
        ("layer_replication", True),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(
    field: str, value: object, adapter: Path
) -> None:
    _set(adapter, **{field: value})
    for read in (read_config, load_adapter, lambda path: examine(path, "x")):
        with pytest.raises(AdapterError, match=rf"adapter_config\.json: {field}\b.* expected"):
            read(adapter)


@pytest.mark.parametrize("name", ["adapter_config.json", "training.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000, "nested|not JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "nested"),
        (b'{"r": 1, "r": 2}', "twice"),
        (b"\xff", "not UTF-8"),
        (b'{"a": "\\ud800"}', "lone surrogate"),
        (b"[]", "not a JSON object"),
    ],
)
def test_what_is_no_json_is_refused(name: str, content: bytes, words: str, adapter: Path) -> None:
    (adapter / name).write_bytes(content)
    with pytest.raises(AdapterError, match=words):
        load_adapter(adapter)


def test_a_byte_order_mark_changes_nothing(adapter: Path) -> None:
    for name in ("adapter_config.json", "training.json"):
        file = adapter / name
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_adapter(adapter).ranks() == load_adapter(SHOUT).ranks()


@pytest.mark.parametrize(
    ("field", "value"), [("labels", "yes"), ("labels", [1]), ("base_fingerprint", 3)]
)
def test_a_record_of_other_types_is_refused(field: str, value: object, adapter: Path) -> None:
    _set(adapter, "training.json", **{field: value})
    with pytest.raises(AdapterError, match=rf"training\.json: {field}"):
        read_training(adapter)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["(x+x+)+y", "((a|aa)+)z", "(([a-z_.0-9])+.)+[A-Z]"])
def test_a_catastrophic_pattern_does_not_hang(field: str, pattern: str, adapter: Path) -> None:
    _set(adapter, **{field: {pattern: 8}})
    started = time.thread_time()
    for read in (load_adapter, lambda path: examine(path, "x")):
        with contextlib.suppress(AdapterError):
            read(adapter)
    assert time.thread_time() - started < 10


def test_a_header_of_many_empty_tensors_is_quick(adapter: Path) -> None:
    header = {
        f"base_model.model.m.{index}.lora_A.weight": {
            "dtype": "F32",
            "shape": [0, 4],
            "data_offsets": [0, 0],
        }
        for index in range(100_000)
    }
    text = json.dumps(header).encode()
    (adapter / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    started = time.thread_time()
    with pytest.raises(AdapterError):
        lora_edge.load_adapter(adapter)
    assert time.thread_time() - started < 8
