"""The session on a graph without a cache, against numpy: padding, types, adapters, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lora_edge.bundle.manifest import Manifest
from lora_edge.bundle.part import Part, SiteEntry
from lora_edge.errors import BundleError, DataError
from lora_edge.maths.lora import Factors, SiteChange
from lora_edge.runtime.adapters.binding import Binding
from lora_edge.runtime.encoder import Encoder

VOCAB, HIDDEN, LABELS, LENGTH = 23, 6, 3, 12
SITES = {"classifier": SiteEntry(HIDDEN, LABELS)}
PART = Part(
    file="onnx/model.onnx",
    form="portable",
    backend="trace",
    inputs=("input_ids", "attention_mask", "token_type_ids"),
    output="logits",
    vocab_size=VOCAB,
    max_length=LENGTH,
    pad_token_id=4,
    sites=SITES,
)
IMAGES = replace(
    PART, inputs=("pixel_values",), vocab_size=0, max_length=0, pad_token_id=0, sample=(3, 2, 4)
)


def _open(path: Path, part: Part) -> Encoder:
    return Encoder(path.parent, {"encoder": replace(part, file=path.name)})


def _draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


WEIGHTS = {
    "words": _draw(0, VOCAB, HIDDEN),
    "types": _draw(1, 2, HIDDEN),
    "classifier.weight": _draw(2, HIDDEN, LABELS),
}
ADAPTERS = {
    "one": Factors(_draw(3, HIDDEN, 2), _draw(4, 2, LABELS)),
    "two": Factors(_draw(5, HIDDEN, 5), _draw(6, 5, LABELS)),
}


def _info(name: str, kind: int, *shape: Any) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def _branch(x: str) -> list[Any]:
    """Named ``logits``: ``x [batch, 1, hidden]`` through the classifier and its branch."""
    return [
        helper.make_node("MatMul", [x, "classifier.weight"], ["base"]),
        helper.make_node("MatMul", [x, "lora.classifier.A"], ["down"]),
        helper.make_node("Mul", ["down", "lora.classifier.gate"], ["gated"]),
        helper.make_node("MatMul", ["gated", "lora.classifier.B"], ["up"]),
        helper.make_node("Add", ["base", "up"], ["both"]),
        helper.make_node("Squeeze", ["both", "one"], ["logits"]),
    ]


def _save(path: Path, nodes: list[Any], inputs: list[Any]) -> Path:
    float32 = TensorProto.FLOAT
    inputs = [
        *inputs,
        _info("lora.classifier.A", float32, HIDDEN, "a"),
        _info("lora.classifier.B", float32, "b", LABELS),
        _info("lora.classifier.gate", float32, "g0", "g1", "g2"),
    ]
    constants = {**WEIGHTS, "one": np.array([1], np.int64), "two": np.array([2], np.int64)}
    graph = helper.make_graph(
        nodes,
        "encoder",
        inputs,
        [_info("logits", float32, "batch", LABELS)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mean over a row's embeddings, through a classifier with a branch."""
    node, i64 = helper.make_node, TensorProto.INT64
    nodes = [
        node("Gather", ["words", "input_ids"], ["w"]),
        node("Gather", ["types", "token_type_ids"], ["t"]),
        node("Add", ["w", "t"], ["e"]),
        node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["m", "two"], ["kept"]),
        node("Mul", ["e", "kept"], ["masked"]),
        node("ReduceSum", ["masked", "one"], ["total"], keepdims=1),
        node("ReduceSum", ["kept", "one"], ["count"], keepdims=1),
        node("Div", ["total", "count"], ["mean"]),
        *_branch("mean"),
    ]
    inputs = [_info(name, i64, "batch", "seq") for name in PART.inputs]
    return _save(tmp_path_factory.mktemp("graph") / "model.onnx", nodes, inputs)


@pytest.fixture(scope="module")
def encoder(graph: Path) -> Encoder:
    return _open(graph, PART)


def _reference(ids: list[int], types: list[int], adapter: str | None = None) -> np.ndarray:
    mean = (WEIGHTS["words"][ids] + WEIGHTS["types"][types]).astype(np.float64).mean(0)
    weight = WEIGHTS["classifier.weight"].astype(np.float64)
    if adapter is not None:
        weight = weight + ADAPTERS[adapter].A.astype(np.float64) @ ADAPTERS[adapter].B
    logits: np.ndarray = mean @ weight
    return logits


ROWS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 4], [14]]
TYPES = [[0, 1, 1], [0, 0, 0, 1, 1, 1, 1], [0]]


def test_rows_are_padded_on_the_right_with_the_models_own_token(encoder: Encoder) -> None:
    feeds = encoder.feeds(ROWS, TYPES)
    assert feeds["input_ids"].tolist()[0] == [5, 6, 7, 4, 4, 4, 4]
    assert feeds["attention_mask"].sum(1).tolist() == [3, 7, 1]
    assert feeds["token_type_ids"].tolist()[1] == TYPES[1]
    assert {array.dtype for array in feeds.values()} == {np.dtype(np.int64)}
    assert not encoder.feeds(ROWS)["token_type_ids"].any()


def test_a_batch_equals_its_rows_alone(encoder: Encoder) -> None:
    whole = encoder.run(encoder.feeds(ROWS, TYPES))
    assert whole.shape == (3, LABELS)
    for row, types, logits in zip(ROWS, TYPES, whole, strict=True):
        np.testing.assert_allclose(logits, _reference(row, types), atol=1e-5)
    without = encoder.run(encoder.feeds(ROWS))
    assert np.abs(without[:2] - whole[:2]).max() > 0.1  # the types are not passed over


def test_adapters_are_bound_and_differ_from_row_to_row(encoder: Encoder) -> None:
    tensors = encoder.tensors
    feeds = encoder.feeds(ROWS, TYPES)
    for name, factors in ADAPTERS.items():
        changes = {"classifier": SiteChange(factors)}
        values = {**tensors.changes(changes, [changes]), **tensors.weight(1.0)}
        found = encoder.run(feeds, Binding((((name, 1.0),),), values))
        for row, types, logits in zip(ROWS, TYPES, found, strict=True):
            np.testing.assert_allclose(logits, _reference(row, types, name), atol=1e-5)
            assert np.abs(logits - _reference(row, types)).max() > 0.1
    both = Factors(
        np.concatenate([x.A for x in ADAPTERS.values()], 1),
        np.concatenate([x.B for x in ADAPTERS.values()], 0),
    )
    weights = np.array([[1, 0], [0, 1], [0, 0]], np.float32)
    gates, arrays = tensors.row_weights({"classifier": (2, 5)}, weights)
    states = ((("one", 1.0),), (("two", 1.0),), ())
    values = tensors.changes({"classifier": SiteChange(both)}, [{}, {}])
    mixed = Binding(states, {**values, **gates}, arrays)
    found = encoder.run(feeds, mixed)
    for row, types, name, logits in zip(ROWS, TYPES, ("one", "two", None), found, strict=True):
        np.testing.assert_allclose(logits, _reference(row, types, name), atol=1e-5)
    with pytest.raises(DataError, match="adapters were given for 3 rows, the batch has 1"):
        encoder.run(encoder.feeds(ROWS[:1]), mixed)


def test_results_are_the_callers_own(encoder: Encoder) -> None:
    first = encoder.run(encoder.feeds(ROWS, TYPES))
    kept = first.copy()
    encoder.run(encoder.feeds(ROWS[::-1], TYPES[::-1]))
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_type_ids": None}, "token_type_ids was not given"),
        ({"pixel_values": [[1]]}, "pixel_values is no input of the model"),
        ({"input_ids": [[1, VOCAB]]}, f"token id {VOCAB} is outside"),
        ({"input_ids": [[-1, 2]]}, "token id -1 is outside"),
        ({"input_ids": [[1.0, 2.0]]}, "input_ids is float64, expected integers"),
        ({"attention_mask": [[0, 1]]}, "not ones followed by zeros"),
        ({"attention_mask": [[0, 0]]}, "not ones followed by zeros"),
        ({"attention_mask": [[1, 2]]}, "not ones followed by zeros"),
        ({"attention_mask": [[1]]}, r"attention_mask is \[1, 1\] and input_ids \[1, 2\]"),
        ({"input_ids": [1, 2]}, r"input_ids is \[2\]"),
    ],
)
def test_refused_feeds(encoder: Encoder, changes: dict[str, Any], message: str) -> None:
    feeds = {name: np.array([[1, 1]]) for name in PART.inputs}
    encoder.run(feeds)  # the control
    for name, value in changes.items():
        feeds[name] = np.array(value)
        if value is None:
            del feeds[name]
    with pytest.raises(DataError, match=message):
        encoder.run(feeds)


def test_a_mask_with_a_hole_and_a_long_row_are_refused(encoder: Encoder) -> None:
    feeds = {name: np.array([[1, 0, 1]]) for name in PART.inputs}
    with pytest.raises(DataError, match="not ones followed by zeros"):
        encoder.run(feeds)
    encoder.run(encoder.feeds([[1] * LENGTH]))
    with pytest.raises(DataError, match=f"has {LENGTH + 1} tokens; the model has {LENGTH}"):
        encoder.run(encoder.feeds([[1] * (LENGTH + 1)]))


@pytest.mark.parametrize("rows", [[], [[1], []]])
def test_empty_rows_are_refused(encoder: Encoder, rows: list[list[int]]) -> None:
    with pytest.raises(DataError, match="expected at least one row"):
        encoder.feeds(rows)


def test_types_of_another_length_are_refused(encoder: Encoder) -> None:
    with pytest.raises(DataError, match="not as long as the rows"):
        encoder.feeds([[1, 2]], [[0]])


def test_a_graph_that_is_not_what_the_manifest_says_is_refused(graph: Path) -> None:
    with pytest.raises(BundleError, match=r"the first is lora\.classifier\.A"):
        _open(graph, replace(PART, sites={}))
    with pytest.raises(BundleError, match="lacks last_hidden_state"):
        _open(graph, replace(PART, output="last_hidden_state"))
    with pytest.raises(BundleError, match="lacks pixel_values"):
        _open(graph, IMAGES)


def test_images(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ReduceMean", ["pixel_values", "two"], ["rows"], keepdims=0),
        helper.make_node("Flatten", ["rows"], ["flat"]),
        helper.make_node("Slice", ["flat", "zero", "six", "one"], ["some"]),
        helper.make_node("Unsqueeze", ["some", "one"], ["x"]),
        *_branch("x"),
    ]
    path = _save(
        tmp_path / "model.onnx", nodes, [_info("pixel_values", TensorProto.FLOAT, "batch", 3, 2, 4)]
    )
    model = onnx.load(path)
    for name, value in (("zero", 0), ("six", HIDDEN)):
        model.graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
    onnx.save(model, path)
    encoder = _open(path, IMAGES)
    pixels = _draw(9, 2, 3, 2, 4)
    wanted = pixels.mean(2).reshape(2, -1)[:, :HIDDEN] @ WEIGHTS["classifier.weight"]
    np.testing.assert_allclose(encoder.run({"pixel_values": pixels}), wanted, atol=1e-5)
    for wrong in (pixels[0], pixels[:0], pixels[:, :1], pixels.astype(np.float64)):
        with pytest.raises(DataError, match=r"expected \[batch, 3, 2, 4\] float32"):
            encoder.run({"pixel_values": wrong})
    with pytest.raises(DataError, match="takes images"):
        encoder.feeds([[1]])


@pytest.mark.parametrize("part", [PART, IMAGES])
def test_the_manifest_keeps_the_facts(part: Part) -> None:
    manifest = Manifest(
        mode="switchable",
        task="image-classification" if part.sample else "text-classification",
        precision="fp32",
        parts={"encoder": part},
        base={"fingerprint": "f", "model_type": "m", "name_or_path": "n"},
        kinds=(),
        adapters={},
        base_check={},
        versions={},
    )
    read = Manifest.from_json(manifest.to_json())
    assert read == manifest
    assert read.reads == read.gives == part
