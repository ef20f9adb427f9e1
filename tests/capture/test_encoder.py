"""Models without a cache: each family is right against PyTorch, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
import transformers

from lora_edge.base.checkpoint import resolve_base
from lora_edge.capture import BaseGraph, capture
from lora_edge.errors import BaseModelError, CaptureError, UnsupportedModelError
from lora_edge.graph import check
from lora_edge.tasks.task import Task, fresh_head
from tests.support.checks import checked
from tests.support.encoders import IMAGE_FAMILIES, TEXT_FAMILIES, TEXT_TASKS, make_encoder
from tests.support.examples import examples

# transformers 4 gives these no attention interface.
SINCE_5 = frozenset(
    {"bert", "roberta", "xlm-roberta", "camembert", "distilbert", "modernbert", "electra"}
)
OLD = transformers.__version__.startswith("4.")
CASES = [(family, task) for family in TEXT_FAMILIES for task in TEXT_TASKS] + [
    (family, task)
    for family in IMAGE_FAMILIES
    for task in ("image-classification", "feature-extraction")
]
needs_5 = pytest.mark.skipif(OLD, reason="transformers 4's BERT has no attention interface")


def _capture(base: Path, folder: Path, task: Task) -> BaseGraph:
    folder.mkdir()
    graph = capture(resolve_base(base), folder, task)
    check(graph.path())
    return graph


def _initializers(path: Path) -> dict[str, np.ndarray]:
    return {x.name: onnx.numpy_helper.to_array(x) for x in onnx.load(path).graph.initializer}


@pytest.mark.parametrize(
    ("family", "name"),
    # Every family once, every task often.
    examples(CASES, lambda row: row in CASES[:3] or row in CASES[3::2]),
)
def test_family_equals_pytorch_or_is_refused(family: str, name: str, tmp_path: Path) -> None:
    base, task = make_encoder(family, name, tmp_path / "base"), Task(name)
    if OLD and family in SINCE_5:
        with pytest.raises(UnsupportedModelError, match="attention interface"):
            _capture(base, tmp_path / "out", task)
        return
    graph = _capture(base, tmp_path / "out", task)
    figures = checked(graph, resolve_base(base), task)
    assert len(figures["cases"]) == (2 if graph.reads.sample else 3)
    assert max(case["error"] for case in figures["cases"].values()) <= 1e-5
    assert figures["window_covered"]
    assert figures["longest_row"] == (0 if graph.reads.sample else 85)
    model = onnx.load(graph.path(), load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    assert tuple(value.name for value in model.graph.input) == graph.reads.inputs
    assert [value.name for value in model.graph.output] == [graph.reads.output]


@pytest.mark.parametrize(
    ("family", "name", "changes", "reason"),
    [
        ("deberta-v2", "text-classification", {}, "attention interface"),
        ("mpnet", "feature-extraction", {}, "attention interface"),
        ("albert", "token-classification", {}, "share their weights|attention interface"),
        pytest.param(
            *("swin", "image-classification", {"image_size": 48}, "mask of its own"),
            marks=pytest.mark.skipif(OLD, reason="transformers 4's Swin is traced as it is"),
        ),
        ("bloom", "text-classification", {}, "alibi"),
        ("gpt2", "text-classification", {"pad_token_id": None}, "has no pad_token_id"),
        ("mixtral", "text-classification", {"num_local_experts": 4}, "mixtures of experts"),
    ],
)
def test_refused_by_name(
    family: str, name: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    base = make_encoder(family, name, tmp_path / "base", **changes)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        _capture(base, tmp_path / "out", Task(name))
    assert caught.value.hint


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(BaseModelError, match="'telepathy' is unknown") as caught:
        Task("telepathy")
    assert "token-classification" in caught.value.hint


@needs_5
def test_a_model_of_another_task_is_refused(tmp_path: Path) -> None:
    base = make_encoder("vit", "image-classification", tmp_path / "base")
    with pytest.raises(BaseModelError, match="cannot be loaded as a model for text-classification"):
        _capture(base, tmp_path / "out", Task("text-classification"))


@needs_5
def test_each_linear_is_one_named_matmul_on_three_axes(tmp_path: Path) -> None:
    base = make_encoder("bert", "text-classification", tmp_path / "base")
    graph = _capture(base, tmp_path / "out", Task("text-classification"))
    model = onnx.shape_inference.infer_shapes(onnx.load(graph.path()))
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*model.graph.value_info, *model.graph.output)
    }
    nodes = {node.name: node for node in model.graph.node}
    tensors = _initializers(graph.path())
    assert graph.head == "classifier"
    linears = {p: x for p, x in graph.modules.items() if x.kind in ("linear", "head")}
    assert {"bert.pooler.dense", "classifier"} < set(linears)
    assert linears["classifier"].kind == "head"
    assert len(linears) == 6 * 2 + 2
    for path, entry in linears.items():
        assert nodes[path].op_type == "MatMul"
        assert nodes[path].input[1] == f"{path}.weight"
        assert tensors[f"{path}.weight"].shape == (entry.in_features, entry.out_features)
        assert ranks[nodes[path].output[0]] == 3
    assert ranks["logits"] == 2


def test_the_patch_embedding_is_one_convolution(tmp_path: Path) -> None:
    base = make_encoder("vit", "image-classification", tmp_path / "base")
    graph = _capture(base, tmp_path / "out", Task("image-classification"))
    path = "vit.embeddings.patch_embeddings.projection"
    (conv,) = [n for n in onnx.load(graph.path()).graph.node if n.op_type == "Conv"]
    assert conv.name == path
    assert list(conv.input[1:]) == [f"{path}.weight", f"{path}.bias"]
    assert _initializers(graph.path())[f"{path}.weight"].shape == (32, 3, 8, 8)
    assert graph.reads.sample == (3, 24, 24)
    dims = onnx.load(graph.path()).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch_size", 3, 24, 24]


@needs_5
@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_the_head_alone_may_be_missing(family: str, tmp_path: Path) -> None:
    encoder = make_encoder(family, "feature-extraction", tmp_path / "base")
    task = Task("text-classification", num_labels=5)
    graph = _capture(encoder, tmp_path / "out", task)
    figures = checked(graph, resolve_base(encoder), task)
    assert max(case["error"] for case in figures["cases"].values()) <= 1e-6
    made = fresh_head(f"{graph.head}.weight", (5, 32))
    np.testing.assert_array_equal(_initializers(graph.path())[f"{graph.head}.weight"], made.T)
    assert np.ptp(made) > 0.01


@needs_5
def test_a_head_of_another_size_is_replaced(tmp_path: Path) -> None:
    base = make_encoder("bert", "token-classification", tmp_path / "base")
    graph = _capture(base, tmp_path / "out", Task("token-classification", num_labels=7))
    assert graph.modules["classifier"].out_features == 7
    own = _capture(base, tmp_path / "own", Task("token-classification"))
    assert own.modules["classifier"].out_features == 3
    saved = transformers.AutoModelForTokenClassification.from_pretrained(base)
    np.testing.assert_array_equal(
        _initializers(own.path())["classifier.weight"], saved.classifier.weight.detach().numpy().T
    )


@needs_5
def test_anything_else_that_is_missing_is_refused(tmp_path: Path) -> None:
    """A masked language model has no pooler, and PEFT would not save it."""
    base = make_encoder("bert", "feature-extraction", tmp_path / "base")
    masked = transformers.BertForMaskedLM.from_pretrained(base)
    masked.save_pretrained(tmp_path / "masked")
    task = Task("text-classification", num_labels=2)
    with pytest.raises(BaseModelError, match=r"bert\.pooler\.dense\.bias"):
        _capture(tmp_path / "masked", tmp_path / "out", task)
    with pytest.raises(BaseModelError, match="pooler"):
        checked(_capture(base, tmp_path / "c", task), resolve_base(tmp_path / "masked"), task)
    # Without a pooler there is nothing to miss.
    _capture(tmp_path / "masked", tmp_path / "tokens", Task("token-classification", num_labels=2))
    _capture(tmp_path / "masked", tmp_path / "features", Task("feature-extraction"))


@needs_5
def test_further_modules_may_come_with_the_adapter_if_they_are_named(tmp_path: Path) -> None:
    """PEFT saves DistilBERT's ``pre_classifier`` only when it is asked to."""
    base = make_encoder("distilbert", "feature-extraction", tmp_path / "base")
    with pytest.raises(BaseModelError, match="pre_classifier"):
        _capture(base, tmp_path / "out", Task("text-classification", 2))
    named = Task("text-classification", 2, heads=("classifier", "pre_classifier"))
    graph = _capture(base, tmp_path / "named", named)
    checked(graph, resolve_base(base), named)


def test_a_capture_without_its_window_is_refused(tmp_path: Path) -> None:
    """The control: the same weights without the window must fail the base check."""
    task = Task("text-classification")
    base = make_encoder("mistral", task.name, tmp_path / "base")
    other = make_encoder("mistral", task.name, tmp_path / "other", sliding_window=None)
    graph = _capture(other, tmp_path / "out", task)
    with pytest.raises(CaptureError, match="rows padded on the right"):
        checked(graph, resolve_base(base), task)


@needs_5
@pytest.mark.parametrize(("name", "value"), [("token_type_ids", 0), ("attention_mask", 1)])
def test_a_capture_that_ignores_an_input_is_refused(name: str, value: int, tmp_path: Path) -> None:
    task = Task("text-classification")
    base = make_encoder("bert", task.name, tmp_path / "base")
    graph = _capture(base, tmp_path / "out", task)
    checked(graph, resolve_base(base), task)
    model = onnx.load(graph.path())
    nodes = [
        onnx.helper.make_node("Shape", [name], ["its_shape"]),
        onnx.helper.make_node(
            "ConstantOfShape",
            ["its_shape"],
            ["ignored"],
            value=onnx.helper.make_tensor("value", onnx.TensorProto.INT64, [1], [value]),
        ),
    ]
    for node in model.graph.node:
        node.input[:] = ["ignored" if i == name else i for i in node.input]
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    onnx.save(model, graph.path())
    with pytest.raises(CaptureError, match="differs from PyTorch"):
        checked(graph, resolve_base(base), task)


def test_a_model_that_always_says_the_same_proves_nothing(tmp_path: Path) -> None:
    task = Task("text-classification")
    base = make_encoder("llama", task.name, tmp_path / "base")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    with torch.no_grad():
        model.score.weight.zero_()
    model.save_pretrained(tmp_path / "zero")
    graph = _capture(tmp_path / "zero", tmp_path / "out", task)
    with pytest.raises(CaptureError, match="proves nothing"):
        checked(graph, resolve_base(tmp_path / "zero"), task)


def test_nothing_global_is_left_behind(tmp_path: Path) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before, view = set(ALL_ATTENTION_FUNCTIONS.keys()), torch.Tensor.view
    base = make_encoder("vit", "image-classification", tmp_path / "base")
    _capture(base, tmp_path / "out", Task("image-classification"))
    assert set(ALL_ATTENTION_FUNCTIONS.keys()) == before
    assert torch.Tensor.view is view
