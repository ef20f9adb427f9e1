"""A graph in float16: weights that are stored so, and what is computed in it.

Two steps. :func:`store_half` keeps every number that a graph computes and casts its weights from
float16. :func:`compute_half` makes all else float16 too, but for what
:mod:`lora_edge.graph.wide` tells to stay.

Converters that exist (``onnxruntime.transformers.float16``, ``onnxconverter_common``) clip weights,
leave Cast nodes as they are, and need types that nobody infers behind ``com.microsoft`` operators.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lora_edge.errors import GraphError
from lora_edge.graph.wide import ELEMENTWISE, FLOAT, HALF, constant, float_values, wide_nodes
from lora_edge.maths.half import overflow
from lora_edge.names import SELECT, is_past, parse_lora_input

_COPY = ".merged"
_INLINE = 1024  # bytes; what is larger lies in the data file, which other graphs read too

_SATURATING = frozenset({"Erf", "Sigmoid", "Tanh"})


def store_half(model: ir.Model, weights: Collection[str]) -> None:
    """Store the base's weights in float16, and cast them to what the graph computes in.

    Args:
        model: a graph in float32; changed in place, its values computed when they are written.
        weights: names of the parameters that are weights: those of two dimensions and more.
    """
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != FLOAT or not value.uses():
            continue
        if len(tensor.shape) > 1 and name.removesuffix(_COPY) in weights:
            _halve_initializer(graph, name, value, tensor)


def _halve_initializer(
    graph: ir.Graph, name: str, value: ir.Value, tensor: ir.TensorProtocol
) -> None:
    def compute() -> ir.TensorProtocol:
        return ir.Tensor(checked_half(name, tensor.numpy()), name=name)

    shape = ir.Shape(int(size) for size in tensor.shape.numpy())
    stored = ir.Value(
        name=name,
        shape=shape,
        type=ir.TensorType(HALF),
        const_value=ir.LazyTensor(compute, dtype=HALF, shape=shape, name=name, cache=False),
    )
    del graph.initializers[name]
    value.name = None
    value.const_value = None
    cast = ir.node("Cast", [stored], {"to": int(FLOAT)}, name=f"{name}.wide")
    cast.outputs[0].name, cast.outputs[0].type = cast.name, ir.TensorType(FLOAT)
    cast.outputs[0].shape = shape
    for use in list(value.uses()):
        use.node.replace_input_with(use.idx, cast.outputs[0])
    graph.register_initializer(stored)
    graph.insert_before(graph[0], [cast])


def checked_half(name: str, values: NDArray[np.floating]) -> NDArray[np.float16]:
    """A weight in float16.

    Raises:
        GraphError: it holds a number that float16 cannot.
    """
    largest = overflow(values)
    if largest:
        raise GraphError(
            f"{name} holds {largest:.6g}, and float16 has no number above 65504",
            "Use --precision fp32.",
        )
    return np.ascontiguousarray(values.astype(np.float16))


def compute_half(model: ir.Model) -> None:
    """Compute in float16: inputs of adapters and cache, weights, activations.

    Other inputs of floats, and outputs beside the cache, stay float32.

    Args:
        model: a graph after :func:`store_half`; changed in place.

    Raises:
        GraphError: a constant of the graph that is computed with is more than float16 holds.
    """
    floats = float_values(model)
    _Halving(model, floats, wide_nodes(model, floats)).run()


def half_values(model: ir.Model) -> list[ir.Value]:
    """The values that :func:`compute_half` would make float16, and that must not overflow.

    The graph's constants are none of them, nor is what only a function reads that saturates: an
    infinite ``x ** 3`` gives GELU's tanh the 1 that it has anyway.
    """
    floats = float_values(model)
    wide = wide_nodes(model, floats)
    found: dict[ir.Value, None] = {}
    for node in model.graph:
        if node not in wide and node.op_type != "Constant" and not _is_cast_of_weight(node):
            for value in (*node.inputs, *node.outputs):
                if value is not None and value in floats and _changes(value):
                    found[value] = None
    harmless: set[ir.Value] = set()
    for node in reversed(list(model.graph)):
        for value in node.outputs:
            uses = list(value.uses())
            if uses and all(
                use.node.op_type in _SATURATING
                or (use.node.op_type in ELEMENTWISE and use.node.outputs[0] in harmless)
                for use in uses
            ):
                harmless.add(value)
    return [value for value in found if value not in harmless]


def _changes(value: ir.Value) -> bool:
    """Whether a value is none of the graph's constants, nor an empty output."""
    node = value.producer()
    if node is None or node.op_type == "Constant" or not value.name:
        return False
    return not _is_cast_of_weight(node) and not str(value.name).startswith("present.")


def _is_cast_of_weight(node: ir.Node) -> bool:
    value = node.inputs[0] if node.op_type == "Cast" and node.inputs else None
    return value is not None and value.is_initializer() and value.dtype == HALF


def same_but_for_half(exact: ir.Model, half: ir.Model) -> bool:
    """Whether a graph is what :func:`compute_half` makes of another, which is changed in place."""
    compute_half(exact)
    first, second = (ir.to_proto(x).SerializeToString(deterministic=True) for x in (exact, half))
    return bool(first == second)


def _is_ours(name: str) -> bool:
    """Whether an input of floats is an adapter's or the cache's: others stay float32."""
    return name == SELECT or is_past(name) or parse_lora_input(name) is not None


@dataclass
class _Halving:
    """One graph on its way into float16."""

    model: ir.Model
    floats: set[ir.Value]
    wide: set[ir.Node]
    _dtypes: dict[ir.Value, ir.DataType] = field(default_factory=dict)
    _casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = field(default_factory=dict)

    def run(self) -> None:
        graph = self.model.graph
        for value in graph.inputs:
            if value in self.floats:
                self._set(value, HALF if _is_ours(str(value.name)) else FLOAT)
        for value in graph.initializers.values():
            if value in self.floats:
                self._dtypes[value] = value.dtype or FLOAT
        for node in list(graph):
            self._node(node)
        for index, value in enumerate(list(graph.outputs)):
            if value in self.floats and not str(value.name).startswith("present."):
                self._output(index, value)
        RemoveUnusedNodesPass()(self.model)  # casts of weights, and constants, that nobody reads

    def _set(self, value: ir.Value, dtype: ir.DataType) -> None:
        self._dtypes[value] = dtype
        value.type = ir.TensorType(dtype)

    def _node(self, node: ir.Node) -> None:
        if node.op_type == "Constant":
            for made in node.outputs:
                if made in self.floats:
                    self._set(made, FLOAT)
            return
        wanted = FLOAT if node in self.wide else HALF
        if _is_cast_of_weight(node):
            self._set(node.outputs[0], FLOAT)
            return
        for index, value in enumerate(node.inputs):
            if value is not None and value in self.floats:
                node.replace_input_with(index, self._as(value, wanted))
        self._inside(node)
        if node.op_type == "Cast" and node.outputs[0] in self.floats:
            node.attributes["to"] = ir.AttrInt64("to", int(wanted))
        for made in node.outputs:
            if made in self.floats:
                self._set(made, wanted)

    def _inside(self, node: ir.Node) -> None:
        """Branches go on computing in float32, whatever they read from outside."""
        for attribute in node.attributes.values():
            if attribute.type != ir.AttributeType.GRAPH:
                continue
            for inner in attribute.as_graph():
                for index, value in enumerate(inner.inputs):
                    if value in self._dtypes:
                        inner.replace_input_with(index, self._as(value, FLOAT))
                self._inside(inner)

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A value in a dtype."""
        if self._dtypes.get(value, FLOAT) == dtype:
            return value
        producer = value.producer()
        if dtype == HALF and producer is not None and _is_cast_of_weight(producer):
            weight = producer.inputs[0]
            assert weight is not None
            return weight
        key = value, dtype
        if key not in self._casts:
            self._casts[key] = self._small(value) if dtype == HALF else self._cast(value, dtype)
        return self._casts[key]

    def _small(self, value: ir.Value) -> ir.Value:
        """A value in float16: a constant that the graph itself holds is written so."""
        tensor = constant(value)
        if tensor is None or tensor.nbytes > _INLINE:
            return self._cast(value, HALF)
        name = f"{value.name}.half"
        made = ir.Value(
            name=name,
            shape=ir.Shape(int(size) for size in tensor.shape.numpy()),
            type=ir.TensorType(HALF),
            const_value=ir.Tensor(checked_half(str(value.name), tensor.numpy()), name=name),
        )
        self.model.graph.register_initializer(made)
        return made

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        graph = self.model.graph
        name = f"{value.name}.{'half' if dtype == HALF else 'wide'}"
        node = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
        made = node.outputs[0]
        made.name, made.type, made.shape = name, ir.TensorType(dtype), value.shape
        producer = value.producer()
        if producer is None:
            graph.insert_before(graph[0], [node])
        else:
            graph.insert_after(producer, [node])
        return made

    def _output(self, index: int, value: ir.Value) -> None:
        """An output that stays float32, and keeps its name."""
        if self._dtypes[value] == FLOAT:
            return
        name = value.name
        value.name = f"{name}.half"
        made = self._cast(value, FLOAT)
        made.name = name
        self.model.graph.outputs[index] = made


def read_from(model: ir.Model, other: ir.Model) -> None:
    """Let a graph have the values that another one has under the same names, where it has them."""
    for name, value in model.graph.initializers.items():
        if name in other.graph.initializers:
            value.const_value = other.graph.initializers[name].const_value
