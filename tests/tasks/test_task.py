"""A task: the class that loads its model, its head, its outputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lora_edge.errors import BaseModelError
from lora_edge.tasks.task import TASKS, TEXT, TEXT_GENERATION, Task, fresh_head


def test_text_generation_is_a_task_like_the_others() -> None:
    assert Task() == TEXT == Task(TEXT_GENERATION)
    assert (TEXT.loader, TEXT.output, TEXT.heads) == ("AutoModelForCausalLM", "logits", ())
    assert not TEXT.in_head("lm_head.weight")
    assert Task(heads=("score",)).heads == ()  # a generator has no head that an adapter brings


@pytest.mark.parametrize("name", [name for name in TASKS if name != TEXT_GENERATION])
def test_the_others(name: str) -> None:
    import transformers

    task = Task(name, heads=("classifier",))
    assert hasattr(transformers, task.loader)
    both = task.parts == ("encoder", "decoder")
    assert task.parts == (("encoder", "decoder") if both else ("encoder",))
    assert (task.causal, task.seq2seq, task.generates) == (False, both, both)
    assert task.in_head("model.classifier.weight")
    assert not task.in_head("model.classifiers.weight")


def test_which_layers_both_graphs_read() -> None:
    shared = {name for name in TASKS if Task(name).shared}
    assert shared == {"text2text-generation", "automatic-speech-recognition"}


@pytest.mark.parametrize(
    ("path", "unread_by"),
    [
        ("pooler.dense", {"feature-extraction"}),
        ("model.visual.blocks.0.attn", {TEXT_GENERATION}),
        ("audio_tower.layers.0", {TEXT_GENERATION}),
        ("encoder.pooler.dense", set()),
        ("model.layers.0.visualizer", set()),
    ],
)
def test_what_a_task_does_not_read(path: str, unread_by: set[str]) -> None:
    found = {name for name, facts in TASKS.items() for x in facts.unread if x.modules.search(path)}
    assert found == unread_by


def test_an_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(BaseModelError, match="'telepathy' is unknown") as caught:
        Task("telepathy")
    for name in TASKS:
        assert name in caught.value.hint


def test_a_head_is_the_same_in_every_process_and_another_for_each_parameter() -> None:
    one, again = fresh_head("classifier.weight", (3, 4)), fresh_head("classifier.weight", (3, 4))
    np.testing.assert_array_equal(one, again)
    assert one.dtype == np.float32
    assert not np.array_equal(one, fresh_head("score.weight", (3, 4)))
    assert 0.01 < one.std() < 0.03


class _Model:
    """Parameters by name, and modules that tell their size."""

    def __init__(self, **modules: Any) -> None:
        self.modules = modules
        self.config = SimpleNamespace(num_labels=3)

    def named_modules(self) -> list[tuple[str, Any]]:
        return list(self.modules.items())


def test_the_label_layer_is_the_last_of_its_size() -> None:
    sizes = {"encoder": 3, "dense": 8, "classifier": 3, "dropout": None}
    model = _Model(**{name: SimpleNamespace(out_features=size) for name, size in sizes.items()})
    assert Task("text-classification").label_layer(model) == "classifier"
    for task in (TEXT, Task("feature-extraction"), Task("text2text-generation")):
        assert task.label_layer(model) == ""
