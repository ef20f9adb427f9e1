"""Pooling: each way against a loop, sentence-transformers' files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_edge.errors import BundleError, UnsupportedModelError
from lora_edge.runtime.pooling import Pooling, load_pooling

HIDDEN = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float32)
LENGTHS = (5, 2, 1)
MASK = np.array([[1] * n + [0] * (5 - n) for n in LENGTHS])
ROWS = [row[:n].astype(np.float64) for row, n in zip(HIDDEN, LENGTHS, strict=True)]
WAYS = {
    "mean": lambda row: row.mean(0),
    "cls": lambda row: row[0],
    "max": lambda row: row.max(0),
    "lasttoken": lambda row: row[-1],
}


@pytest.mark.parametrize("mode", WAYS)
def test_each_way_sees_the_rows_own_tokens_only(mode: Any) -> None:
    wanted = np.stack([WAYS[mode](row) for row in ROWS])
    found = Pooling(mode)(HIDDEN, MASK)
    assert (found.shape, found.dtype) == ((3, 4), np.float32)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    others = [np.abs(found - Pooling(other)(HIDDEN, MASK)).max() for other in set(WAYS) - {mode}]  # type: ignore[arg-type]
    assert min(others) > 0.1
    normal = Pooling(mode, normalize=True)(HIDDEN, MASK)
    np.testing.assert_allclose(np.linalg.norm(normal, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(
        normal, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-6
    )


def _write(folder: Path, name: str, content: Any) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _modules(*kinds: str) -> list[dict[str, Any]]:
    return [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}", "type": f"sentence_transformers.x.{kind}"}
        for i, kind in enumerate(kinds)
    ]


def test_a_folder_without_files_means_the_mean(tmp_path: Path) -> None:
    assert load_pooling(tmp_path) == Pooling("mean", normalize=False, max_length=None)


def test_the_files_of_sentence_transformers_are_read(tmp_path: Path) -> None:
    config = {"word_embedding_dimension": 4, "pooling_mode_cls_token": True}
    _write(tmp_path, "1_Pooling/config.json", {**config, "pooling_mode_mean_tokens": False})
    assert load_pooling(tmp_path) == Pooling("cls")
    _write(tmp_path, "modules.json", _modules("Transformer", "Pooling", "Normalize"))
    _write(tmp_path, "sentence_bert_config.json", {"max_seq_length": 33, "do_lower_case": False})
    assert load_pooling(tmp_path) == Pooling("cls", normalize=True, max_length=33)
    _write(tmp_path, "1_Pooling/config.json", {"pooling_mode": "lasttoken"})
    assert load_pooling(tmp_path).mode == "lasttoken"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "by pooling_mode_mean_sqrt_len_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "mean_tokens, pool"),
        ({"pooling_mode_cls_token": False}, "by nothing"),
        ({"pooling_mode": "weightedmean"}, "by weightedmean"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": False}, "include_prompt is false"),
    ],
)
def test_other_ways_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    _write(tmp_path, "1_Pooling/config.json", config)
    with pytest.raises(UnsupportedModelError, match=message):
        load_pooling(tmp_path)


def test_other_modules_and_damaged_files_are_refused(tmp_path: Path) -> None:
    _write(tmp_path, "modules.json", _modules("Transformer", "Pooling", "Dense"))
    with pytest.raises(UnsupportedModelError, match="'Dense' is not known"):
        load_pooling(tmp_path)
    (tmp_path / "modules.json").write_text("[")
    with pytest.raises(BundleError, match="is not JSON"):
        load_pooling(tmp_path)
    _write(tmp_path, "modules.json", {"0": "Transformer"})
    with pytest.raises(BundleError, match="is not a JSON list"):
        load_pooling(tmp_path)
