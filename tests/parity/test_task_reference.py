"""The reference of tasks: heads of any size, the low-rank parts off with the head kept, float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from lora_edge.base.checkpoint import Base, resolve_base
from lora_edge.errors import AdapterError, BaseModelError
from lora_edge.parity.plan.states import BASE, only, state_of
from lora_edge.parity.reference import Reference
from lora_edge.tasks.task import SPEECH, TEXT2TEXT, Task
from tests.support.encoders import make_encoder
from tests.support.seq2seq import ALL, ATTENTION, make_seq2seq

TASK = Task("text-classification", 3)
ROWS = [{"input_ids": np.array(row)} for row in ([5, 6, 7, 8], [9, 10], [11] * 7)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    directory = tmp_path_factory.mktemp("bases") / "bert"
    return resolve_base(make_encoder("bert", "feature-extraction", directory))


OFF = [BASE] * len(ROWS)
ON = [only("a")] * len(ROWS)


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
    reference = Reference(base, TASK)
    wrapped = {}
    for name, labels, options in (("two", 2, {}), ("five", 5, {"use_dora": True})):
        folder, wrapped[name] = _adapter(base, tmp_path / name, labels, **options)
        reference.attach(name, folder, labels)
    for name, labels in (("two", 2), ("five", 5)):
        found = reference.outputs(ROWS, [only(name)] * len(ROWS))
        assert [output.shape for output in found] == [(labels,)] * len(ROWS)
        for output, wanted in zip(found, _logits(wrapped[name]), strict=True):
            np.testing.assert_allclose(output, wanted, atol=1e-6)
    assert [output.shape for output in reference.outputs(ROWS, OFF)] == [(3,)] * len(ROWS)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_without_the_low_rank_parts_the_adapters_head_stays(
    base: Base, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Else an adapter whose low-rank parts are lost would hide behind its head."""
    folder, wrapped = _adapter(base, tmp_path / "a", 3, **options)
    reference = Reference(base, TASK)
    reference.attach("a", folder, 3)
    plain = AutoModelForSequenceClassification.from_pretrained(base.directory, num_labels=3).eval()
    plain.classifier.load_state_dict(
        wrapped.base_model.model.classifier.modules_to_save["default"].state_dict()
    )
    without = reference.outputs(ROWS, ON, low_rank=False)
    for output, wanted in zip(without, _logits(plain), strict=True):
        np.testing.assert_allclose(output, wanted, atol=1e-6)
    with_all = reference.outputs(ROWS, ON)
    assert np.abs(np.array(with_all) - np.array(without)).max() > 0.05
    assert np.abs(np.array(without) - np.array(reference.outputs(ROWS, OFF))).max() > 0.05
    for output, wanted in zip(reference.outputs(ROWS, ON), _logits(wrapped), strict=True):
        np.testing.assert_allclose(output, wanted, atol=1e-6)  # and they come back


def test_float64_is_near_and_leaves_the_weights_as_they_were(base: Base, tmp_path: Path) -> None:
    reference = Reference(base, TASK)
    reference.attach("a", _adapter(base, tmp_path / "a", 3)[0], 3)
    before = reference.outputs(ROWS, ON)
    with reference.wide():
        wide = reference.outputs(ROWS, ON)
    assert {output.dtype for output in wide} == {np.dtype(np.float64)}
    assert 0 < np.abs(np.array(wide) - np.array(before)).max() < 1e-5
    np.testing.assert_array_equal(np.array(reference.outputs(ROWS, ON)), np.array(before))


def test_a_head_that_peft_misses_is_an_error_of_the_adapter(base: Base, tmp_path: Path) -> None:
    directory, _ = _adapter(base, tmp_path / "a", 3)
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: x for name, x in tensors.items() if "classifier" not in name}, file)
    reference = Reference(base, TASK)
    reference.attach("a", directory, 3)
    with pytest.raises(AdapterError, match=r"PEFT cannot load .*KeyError.*classifier\.weight"):
        reference.outputs(ROWS, ON)


BLEND = {"some": 0.7, "every": 0.25}


@pytest.fixture(params=["bert", "t5", "whisper"])
def blended(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Reference, Any, Any]:
    """A reference with two adapters of plain LoRA, PEFT's model with both, and a row."""
    family = request.param
    name = {"bert": "feature-extraction", "t5": TEXT2TEXT, "whisper": SPEECH}[family]
    task = Task(name)
    row: dict[str, Any] = {"input_ids": np.array([5, 9, 7, 8])}
    if family == "bert":
        made = make_encoder("bert", name, tmp_path / "base")
        targets = [["query", "value"], ["query", "dense"]]
    else:
        made = make_seq2seq(family, tmp_path / "base")
        targets = [ATTENTION[family], ALL[family]]
        row["decoder_input_ids"] = np.array([3, 8, 4])
    if family == "whisper":
        random = np.random.default_rng(0).standard_normal((16, 40))
        row = {"input_features": random.astype(np.float32), **row}
        del row["input_ids"]
    base = resolve_base(made)
    reference = Reference(base, task)
    model: Any = None
    for index, (adapter, modules) in enumerate(zip(BLEND, targets, strict=True)):
        torch.manual_seed(index)
        config = LoraConfig(
            r=3 + index, lora_alpha=4, target_modules=modules, init_lora_weights=False
        )
        loaded = getattr(transformers, task.loader).from_pretrained(made)
        get_peft_model(loaded, config).save_pretrained(tmp_path / adapter)
        reference.attach(adapter, tmp_path / adapter)
        if model is None:
            loaded = getattr(transformers, task.loader).from_pretrained(made)
            model = PeftModel.from_pretrained(loaded, tmp_path / adapter, adapter).eval()
        else:
            model.load_adapter(tmp_path / adapter, adapter)
    return reference, model, row


def test_a_blend_is_pefts_cat(blended: tuple[Reference, Any, Any]) -> None:
    reference, model, row = blended
    model.add_weighted_adapter(list(BLEND), list(BLEND.values()), "cat", combination_type="cat")
    model.set_adapter("cat")
    feeds = {name: torch.from_numpy(value)[None] for name, value in row.items()}
    with torch.inference_mode():
        wanted = getattr(model.base_model(**feeds), reference.task.output)[0].numpy()
    (alone,) = reference.outputs([row], [state_of("some")])
    (found,) = reference.outputs([row], [state_of(BLEND)])
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    with reference.wide():
        (wide,) = reference.outputs([row], [state_of(BLEND)])
    assert wide.dtype == np.float64
    np.testing.assert_allclose(wide, wanted, atol=1e-5)
    for other in ({"some": 0.7}, {"some": 0.25, "every": 0.7}, {"some": 0.7, "every": 0.3}):
        assert np.abs(reference.outputs([row], [state_of(other)])[0] - wanted).max() > 1e-3, other
    (off,) = reference.outputs([row], [state_of(BLEND)], low_rank=False)
    np.testing.assert_allclose(off, reference.outputs([row], [BASE])[0], atol=1e-6)
    np.testing.assert_array_equal(reference.outputs([row], [state_of("some")])[0], alone)
    np.testing.assert_array_equal(reference.outputs([row], [state_of(BLEND)])[0], found)


def test_a_head_is_not_blended(base: Base, tmp_path: Path) -> None:
    reference = Reference(base, TASK)
    reference.attach("a", _adapter(base, tmp_path / "a", 3)[0], 3)
    assert not reference.can_blend("a")
    with pytest.raises(ValueError, match="cannot blend or weight a"):
        reference.outputs(ROWS, [state_of({"a": 0.5})] * len(ROWS))


def test_what_cannot_be_loaded_is_refused(base: Base) -> None:
    with pytest.raises(
        BaseModelError, match=r"cannot be loaded as a model for image-classification"
    ):
        Reference(base, Task("image-classification"))
    with pytest.raises(BaseModelError, match=r"lacks 2 of its weights.*: classifier\.bias"):
        Reference(base, Task("text-classification", 3, heads=("score",)))
