"""Small hand-made graphs with linear layers in the layouts that exporters write, and an oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from lora_edge.maths.lora import Factors
from lora_edge.names import FACTOR_PARTS, InputPart

BATCH, SEQ = 2, 3
FLOAT = ir.TensorType(ir.DataType.FLOAT)
Array = np.ndarray


@dataclass(frozen=True)
class Shape:
    """Sizes of a linear layer."""

    in_features: int
    out_features: int
    kind: str = "linear"
    rank: int = 3
    transposed: bool = False
    parts: tuple[InputPart, ...] = FACTOR_PARTS


def draw(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def factors(in_features: int, out_features: int, rank: int, seed: int = 0) -> Factors:
    return Factors(draw(in_features, rank, seed=seed), draw(rank, out_features, seed=seed + 1))


@dataclass
class Small:
    """A graph under construction: an input ``x [batch, seq, in]`` and what reads it."""

    in_features: int
    nodes: list[ir.Node] = field(default_factory=list)
    weights: dict[str, ir.Value] = field(default_factory=dict)
    x: ir.Value = field(init=False)

    def __post_init__(self) -> None:
        shape = ir.Shape(["batch", "seq", self.in_features])
        self.x = ir.Value(name="x", shape=shape, type=FLOAT)

    def weight(self, name: str, values: Array) -> ir.Value:
        tensor = ir.tensor(values, name=name)
        self.weights[name] = ir.Value(
            name=name,
            shape=ir.Shape(values.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        return self.weights[name]

    def op(
        self,
        kind: str,
        *inputs: ir.Value,
        name: str | None = None,
        outputs: int = 1,
        **attributes: object,
    ) -> ir.Value:
        label = name or f"{kind}_{len(self.nodes)}"
        node = ir.node(kind, list(inputs), attributes, name=label, num_outputs=outputs)
        for index, value in enumerate(node.outputs):
            value.name = f"{label}_out{index}"
        self.nodes.append(node)
        return node.outputs[0]

    def linear(self, x: ir.Value, name: str, values: Array) -> ir.Value:
        """A MatMul with a weight ``[in, out]``."""
        return self.op("MatMul", x, self.weight(f"{name}.weight", values), name=name)

    def flattened(self, x: ir.Value, name: str, weight: ir.Value, **attributes: int) -> ir.Value:
        """A Gemm on ``[batch * seq, in]``, between two Reshapes; returns the 3-D value."""
        assert weight.shape is not None
        inner, width = weight.shape[::-1] if "transB" in attributes else weight.shape
        flat = self.op("Reshape", x, self.weight(f"{name}.flat", np.int64([-1, inner])))
        y = self.op("Gemm", flat, weight, name=name, **attributes)
        back = self.weight(f"{name}.back", np.int64([BATCH, SEQ, width]))
        return self.op("Reshape", y, back)

    def model(self, *outputs: ir.Value) -> ir.Model:
        for index, value in enumerate(outputs):
            value.name = f"y{index}"
            value.type = FLOAT
            value.shape = value.shape or ir.Shape(["batch", "seq", f"out{index}"])
        graph = ir.Graph(
            [self.x],
            list(outputs),
            nodes=self.nodes,
            initializers=list(self.weights.values()),
            opset_imports={"": 18},
            name="small",
        )
        return ir.Model(graph, ir_version=10)


Run = Callable[..., list[Array]]


def lora_feeds(pairs: Mapping[str, Factors], gate: Array | None = None) -> dict[str, Array]:
    """Inputs of the branches; the gate is 1 unless given."""
    feeds: dict[str, Array] = {}
    for path, pair in pairs.items():
        feeds |= {f"lora.{path}.A": pair.A, f"lora.{path}.B": pair.B}
        feeds[f"lora.{path}.gate"] = np.ones((1, 1, 1), np.float32) if gate is None else gate
    return feeds
