"""Merging adapters into the graph's own weights: ``W + ΔW``, computed wide, rounded once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_edge.errors import GraphError
from lora_edge.graph.sites import Site
from lora_edge.lora import Factors, delta


def merge(model: ir.Model, sites: Mapping[str, Site], factors: Mapping[str, Factors]) -> None:
    """Add each adapter delta to its site's weight.

    The sum is computed in float64 and rounded once to the weight's dtype. It is computed lazily,
    when the weight is written, so that only one weight is in memory at a time. A weight that
    something else reads too (a tied embedding, a shared layer) is left alone, and the site gets a
    copy of its own.

    Args:
        model: the graph; changed in place.
        sites: module path -> site, at least one for each path in ``factors``.
        factors: module path -> ``A [in, R]``, ``B [R, out]`` with the scaling folded in.

    Raises:
        GraphError: a path has no site, or the shapes do not fit.
    """
    by_node: dict[int, list[tuple[Site, Factors]]] = {}
    for path, pair in factors.items():
        site = sites.get(path)
        if site is None:
            raise GraphError(f"the graph has no site {path}", "Export from the adapter's own base.")
        _check_shape(site, pair)
        by_node.setdefault(id(site.node), []).append((site, pair))
    for changes in by_node.values():
        weight = changes[0][0].weight
        if _readers(weight) == 1:
            weight.const_value = _lazy(str(weight.name), _tensor(weight), changes)
        else:
            _untie(model, changes)


def _check_shape(site: Site, pair: Factors) -> None:
    got = (pair.A.shape[0], pair.B.shape[1])
    if got != (site.in_features, site.out_features):
        raise GraphError(
            f"{site.path} is [{site.in_features} -> {site.out_features}], the adapter's delta is "
            f"[{got[0]} -> {got[1]}]",
            "The adapter was trained on another base model.",
        )


def _readers(weight: ir.Value) -> int:
    """How many nodes read a weight, looking through transposes of it."""
    count = 0
    for use in weight.uses():
        node = use.node
        count += _readers(node.outputs[0]) if node.op_type == "Transpose" else 1
    return count


def _merged(tensor: ir.TensorProtocol, changes: list[tuple[Site, Factors]]) -> NDArray[np.generic]:
    original = tensor.numpy()
    wide = original.astype(np.float64)
    for site, pair in changes:
        columns = slice(site.start, site.start + site.out_features)
        if site.transposed:
            wide[columns, :] += delta(pair).T
        else:
            wide[:, columns] += delta(pair)
    merged: NDArray[np.generic] = wide.astype(original.dtype)
    return merged


def _lazy(
    name: str, tensor: ir.TensorProtocol, changes: list[tuple[Site, Factors]]
) -> ir.LazyTensor:
    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(_merged(tensor, changes), name=name)

    return ir.LazyTensor(evaluate, dtype=tensor.dtype, shape=_shape(tensor), name=name, cache=False)


def _tensor(weight: ir.Value) -> ir.TensorProtocol:
    if weight.const_value is None:
        raise GraphError(f"the weight {weight.name} has no values", "Export the base again.")
    return weight.const_value


def _shape(tensor: ir.TensorProtocol) -> ir.Shape:
    return ir.Shape(int(dim) for dim in tensor.shape.numpy())


def _untie(model: ir.Model, changes: list[tuple[Site, Factors]]) -> None:
    """Give a node, which all sites of ``changes`` share, a merged weight of its own."""
    site = changes[0][0]
    name = f"{site.path}.weight"
    if name in model.graph.initializers:
        name += ".merged"
    tensor = _tensor(site.weight)
    value = ir.Value(
        name=name,
        shape=_shape(tensor),
        type=ir.TensorType(tensor.dtype),
        const_value=_lazy(name, tensor, changes),
    )
    model.graph.register_initializer(value)
    node = site.node
    old = node.inputs[1]
    transpose = None if old is None else old.producer()
    if transpose is None:
        node.replace_input_with(1, value)
        return
    # The transpose may serve the tied reader too: the site gets one of its own.
    own = ir.node(
        "Transpose",
        [value],
        attributes={"perm": [1, 0]},
        name=f"{site.path}.transpose",
    )
    own.outputs[0].name = f"{name}.transposed"
    model.graph.insert_before(node, own)
    node.replace_input_with(1, own.outputs[0])
