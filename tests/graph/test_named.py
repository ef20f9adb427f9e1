"""Layers of a foreign graph under the names of our own captures."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from lora_edge.base.layer import Layer
from lora_edge.errors import GraphError
from lora_edge.graph.merge import add_initializer
from lora_edge.graph.named import name_layers

_LAYERS = {"body.q": Layer(8, 8), "body.k": Layer(8, 8), "head": Layer(8, 20)}
_TIED = ("embedding", "head")


def _weights(*, equal: bool = False) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    q, k = (generator.standard_normal((8, 8)).astype(np.float32) for _ in range(2))
    table = generator.standard_normal((20, 8)).astype(np.float32)
    return {
        "body.q.weight": q,
        "body.k.weight": q if equal else k,
        "embedding.weight": table,
        "head.weight": table,
    }


def _model(weights: dict[str, np.ndarray]) -> ir.Model:
    model = ir.from_onnx_text("""
    <ir_version: 10, opset_import: ["" : 18]>
    g (int64[b, s] ids) => (float[b, s, 20] y)
    {
        [one] x = Identity (ids)
        [two] q = Identity (x)
        [three] k = Identity (q)
        [four] y = Identity (k)
    }
    """)
    table = add_initializer(model, "embedding.weight", weights["embedding.weight"])
    first, *others = list(model.graph)
    made = [(first, "Gather", [table, first.inputs[0]])]
    for node, path in zip(others, ("body.q", "body.k", "head"), strict=True):
        copy = np.ascontiguousarray(weights[f"{path}.weight"].T)
        name = f"onnx::MatMul_{path[-1]}"
        made.append((node, "MatMul", [node.inputs[0], add_initializer(model, name, copy)]))
    for node, operator, inputs in made:
        node.op_type = operator
        node.resize_inputs(2)
        for index, value in enumerate(inputs):
            node.replace_input_with(index, value)
    return model


def test_layers_are_found_by_their_weights_and_a_copy_is_tied_again() -> None:
    weights = _weights()
    model = _model(weights)
    name_layers(model, _LAYERS, _TIED, weights.get)
    named = {str(node.name): node for node in model.graph if node.op_type == "MatMul"}
    assert set(named) == set(_LAYERS)
    held = model.graph.initializers
    assert set(held) == {"embedding.weight", "body.q.weight", "body.k.weight"}
    for path in ("body.q", "body.k"):
        assert named[path].inputs[1] is held[f"{path}.weight"]
    turned = named["head"].inputs[1]
    assert turned is not None
    transpose = turned.producer()
    assert transpose is not None
    assert (transpose.op_type, transpose.inputs[0]) == ("Transpose", held["embedding.weight"])


def test_what_cannot_be_told_apart_is_refused() -> None:
    weights = _weights(equal=True)
    with pytest.raises(GraphError, match="cannot be told apart"):
        name_layers(_model(weights), _LAYERS, _TIED, weights.get)
