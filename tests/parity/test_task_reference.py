"""The reference of tasks: heads of any size, the low-rank parts off with the head kept, float64."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from lora_edge.base import Base, resolve_base
from lora_edge.errors import BaseModelError
from lora_edge.parity.task_reference import TaskReference
from lora_edge.tasks import Task

sys.path.insert(0, str(Path(__file__).parents[1]))
from encoders import make_encoder

TASK = Task("text-classification", 3)
ROWS = [{"input_ids": np.array(row)} for row in ([5, 6, 7, 8], [9, 10], [11] * 7)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    directory = tmp_path_factory.mktemp("bases") / "bert"
    return resolve_base(make_encoder("bert", "feature-extraction", directory))


def _adapter(base: Base, directory: Path, labels: int, **options: Any) -> tuple[Path, Any]:
    """A PEFT directory with random factors and a random head, and its model."""
    torch.manual_seed(labels)
    model = AutoModelForSequenceClassification.from_pretrained(base.directory, num_labels=labels)
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=3,
        target_modules=["query", "dense"],
        init_lora_weights=False,
        **options,
    )
    wrapped = get_peft_model(model, config).eval()
    wrapped.save_pretrained(directory)
    return directory, wrapped


def _logits(model: Any) -> list[np.ndarray]:
    with torch.inference_mode():
        return [
            model(input_ids=torch.from_numpy(row["input_ids"])[None]).logits[0].numpy()
            for row in ROWS
        ]


def test_adapters_with_heads_of_unequal_sizes(base: Base, tmp_path: Path) -> None:
    reference = TaskReference(base, TASK)
    wrapped = {}
    for name, labels, options in (("two", 2, {}), ("five", 5, {"use_dora": True})):
        folder, wrapped[name] = _adapter(base, tmp_path / name, labels, **options)
        reference.attach(name, folder, labels)
    for name, labels in (("two", 2), ("five", 5)):
        found = reference.outputs(ROWS, name)
        assert [output.shape for output in found] == [(labels,)] * len(ROWS)
        for output, wanted in zip(found, _logits(wrapped[name]), strict=True):
            np.testing.assert_allclose(output, wanted, atol=1e-6)
    assert [output.shape for output in reference.outputs(ROWS)] == [(3,)] * len(ROWS)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_without_the_low_rank_parts_the_adapters_head_stays(
    base: Base, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Else an adapter whose low-rank parts are lost would hide behind its head."""
    folder, wrapped = _adapter(base, tmp_path / "a", 3, **options)
    reference = TaskReference(base, TASK)
    reference.attach("a", folder, 3)
    plain = AutoModelForSequenceClassification.from_pretrained(base.directory, num_labels=3).eval()
    plain.classifier.load_state_dict(
        wrapped.base_model.model.classifier.modules_to_save["default"].state_dict()
    )
    without = reference.outputs(ROWS, "a", low_rank=False)
    for output, wanted in zip(without, _logits(plain), strict=True):
        np.testing.assert_allclose(output, wanted, atol=1e-6)
    with_all = reference.outputs(ROWS, "a")
    assert np.abs(np.array(with_all) - np.array(without)).max() > 0.05
    assert np.abs(np.array(without) - np.array(reference.outputs(ROWS))).max() > 0.05
    for output, wanted in zip(reference.outputs(ROWS, "a"), _logits(wrapped), strict=True):
        np.testing.assert_allclose(output, wanted, atol=1e-6)  # and they come back


def test_float64_is_near_and_leaves_the_weights_as_they_were(base: Base, tmp_path: Path) -> None:
    reference = TaskReference(base, TASK)
    reference.attach("a", _adapter(base, tmp_path / "a", 3)[0], 3)
    before = reference.outputs(ROWS, "a")
    with reference.wide():
        wide = reference.outputs(ROWS, "a")
    assert {output.dtype for output in wide} == {np.dtype(np.float64)}
    assert 0 < np.abs(np.array(wide) - np.array(before)).max() < 1e-5
    np.testing.assert_array_equal(np.array(reference.outputs(ROWS, "a")), np.array(before))


def test_what_cannot_be_loaded_is_refused(base: Base) -> None:
    with pytest.raises(BaseModelError, match=r"cannot load .* for image-classification"):
        TaskReference(base, Task("image-classification"))
    with pytest.raises(BaseModelError, match=r"lacks 2 weights: classifier\.bias"):
        TaskReference(base, Task("text-classification", 3, heads=("score",)))
