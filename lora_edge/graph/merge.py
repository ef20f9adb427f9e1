"""Merging an adapter into the graph's own weights: computed wide, rounded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lora_edge.errors import GraphError
from lora_edge.graph.sites import Site, Weights, find_initializer, readers

WideArray = NDArray[np.float64]
Change = Callable[["WideArray | None"], WideArray]
"""The base's value of a parameter in float64 (``None``: it has none) -> the adapter's."""


def merge(
    model: ir.Model,
    sites: Mapping[str, Site],
    changes: Mapping[str, Change],
    weights: Weights | None = None,
) -> None:
    """Replace parameters by their changed values.

    Each is computed in float64 and rounded once to the weight's dtype, lazily, when it is written,
    so that only one weight is in memory at a time. A weight that something else reads too (a tied
    embedding, a shared layer) is left alone, and the site gets a copy of its own. A bias that the
    base does not have is added.

    Args:
        model: the graph; changed in place.
        sites: module path -> site, of every module whose parameters change, except modules that
            are none (a stack of experts), whose parameters are found by name.
        changes: parameter path -> change; a linear weight is ``[out, in]``, all else as in the
            checkpoint.
        weights: the checkpoint's parameters, where names do not tell the graph's.

    Raises:
        GraphError: a parameter is not in the graph.
    """
    by_node: dict[int, list[tuple[Site, Change]]] = {}
    for path, change in changes.items():
        module, _, own = path.rpartition(".")
        site = sites.get(module)
        linear = site is not None and site.layer.kind in ("linear", "head")
        if own == "bias" and site is not None and site.layer.kind != "norm":
            _change_bias(model, site, change)
        elif site is not None and linear and own == "weight":
            by_node.setdefault(id(site.node), []).append((site, change))
        elif site is not None and own == "weight":
            _change_reader(model, site, change)
        else:
            _change_initializer(model, path, change, weights)
    for linears in by_node.values():
        _change_linears(model, linears)
    RemoveUnusedNodesPass()(model)  # and the weights that nobody reads any more


def _change_linears(model: ir.Model, changes: list[tuple[Site, Change]]) -> None:
    """All layers of one MatMul or Gemm, in one new weight."""
    weight = changes[0][0].weight

    def merged(original: WideArray) -> WideArray:
        for site, change in changes:
            columns = slice(site.start, site.start + site.out_features)
            if len(changes) == 1 and site.width == site.out_features:
                whole = change(original if site.transposed else original.T)
                return whole if site.transposed else whole.T
            if site.transposed:
                original[columns, :] = change(original[columns, :])
            else:
                original[:, columns] = change(original[:, columns].T).T
        return original

    if readers(weight) == 1:
        weight.const_value = lazily(str(weight.name), weight, merged)
    else:
        _untie(model, changes[0][0], merged)


def _change_reader(model: ir.Model, site: Site, change: Change) -> None:
    """The weight of an embedding, a convolution or a norm."""
    if site.layer.kind == "conv":
        _change_kernel(model, site, change)
    elif readers(site.weight) == 1:
        site.weight.const_value = lazily(str(site.weight.name), site.weight, change)
    else:
        value = _copy(model, f"{site.path}.weight", site.weight, change)
        _reread(site, site.weight, value)


def _change_kernel(model: ir.Model, site: Site, change: Change) -> None:
    """A convolution's kernel; a change of a grouped one reads all channels, so groups end."""
    old = _tensor(site.weight).numpy()
    kernel = change(old.astype(np.float64)).astype(old.dtype)
    channels = site.in_features // int(np.prod(kernel.shape[2:]))
    site.node.attributes["group"] = ir.AttrInt64("group", channels // kernel.shape[1])
    _reread(site, site.weight, add_initializer(model, f"{site.path}.weight", kernel))


def _reread(site: Site, old: ir.Value, new: ir.Value) -> None:
    index = next(i for i, read in enumerate(site.node.inputs) if read is old)
    site.node.replace_input_with(index, new)


def _change_initializer(
    model: ir.Model, path: str, change: Change, weights: Weights | None
) -> None:
    value = find_initializer(model, path, weights)
    # Whoever reads it, and be it both branches of an If, reads this parameter.
    if value is None or not value.uses():
        raise GraphError(
            f"the parameter {path} is not in the graph",
            "Use the trace backend, or another base model.",
        )
    value.const_value = lazily(path, value, change)


def _change_bias(model: ir.Model, site: Site, change: Change) -> None:
    """The bias of a linear layer or a convolution; added where the base has none."""
    place = _bias_input(site)
    if place is not None:
        node, index = place
        bias = node.inputs[index]
        assert bias is not None
        if readers(bias) == 1 and site.width == site.out_features:
            bias.const_value = lazily(str(bias.name), bias, change)
            return
        columns = slice(site.start, site.start + site.out_features)

        def part(whole: WideArray | None) -> WideArray:
            assert whole is not None
            whole[columns] = change(whole[columns])
            return whole

        node.replace_input_with(index, _copy(model, f"{site.path}.bias", bias, part))
        return
    added = np.zeros(site.width, np.float32)
    added[site.start : site.start + site.out_features] = change(None)
    tensor = add_initializer(model, f"{site.path}.bias", added)
    if site.layer.kind == "conv":
        site.node.resize_inputs(3)
        site.node.replace_input_with(2, tensor)
        return
    add = ir.node("Add", [site.y, tensor], name=f"{site.path}.bias")
    total = add.outputs[0]
    total.name, total.type, total.shape = f"{site.path}.biased", site.y.type, site.y.shape
    for use in list(site.y.uses()):
        if use.node is not add:
            use.node.replace_input_with(use.idx, total)
    for index, output in enumerate(model.graph.outputs):
        if output is site.y:
            model.graph.outputs[index] = total
            total.name, site.y.name = site.y.name, f"{site.y.name}.base"
    producer = site.y.producer()
    assert producer is not None
    model.graph.insert_after(producer, add)


def _bias_input(site: Site) -> tuple[ir.Node, int] | None:
    """The node and input that hold the base's bias: the node's own, or an Add that follows."""
    if site.own_bias is not None:
        return site.node, 2
    uses = tuple(site.y.uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add":
        index = 1 - uses[0].idx
        other = uses[0].node.inputs[index]
        if other is not None and other.is_initializer() and other.shape is not None:
            sizes = tuple(other.shape)
            if len(sizes) == 1 and sizes[0] == site.width:
                return uses[0].node, index
    return None


def lazily(name: str, weight: ir.Value, change: Callable[[WideArray], WideArray]) -> ir.LazyTensor:
    """The changed values of a weight, computed when they are read."""
    tensor = _tensor(weight)

    def compute() -> ir.TensorProtocol:
        original = tensor.numpy()
        changed = change(original.astype(np.float64)).astype(original.dtype)
        return ir.Tensor(np.ascontiguousarray(changed), name=name)

    return ir.LazyTensor(compute, dtype=tensor.dtype, shape=_shape(tensor), name=name, cache=False)


def _tensor(weight: ir.Value) -> ir.TensorProtocol:
    if weight.const_value is None:
        raise GraphError(f"the weight {weight.name} has no values", "Export the base again.")
    return weight.const_value


def _shape(tensor: ir.TensorProtocol) -> ir.Shape:
    return ir.Shape(int(dim) for dim in tensor.shape.numpy())


def _copy(
    model: ir.Model, name: str, weight: ir.Value, change: Callable[[WideArray], WideArray]
) -> ir.Value:
    """A new initializer with the changed values of a weight that others go on reading."""
    tensor = _tensor(weight)
    value = ir.Value(
        name=_free(model, name),
        shape=_shape(tensor),
        type=ir.TensorType(tensor.dtype),
        const_value=lazily(name, weight, change),
    )
    model.graph.register_initializer(value)
    return value


def add_initializer(model: ir.Model, name: str, array: NDArray[np.generic]) -> ir.Value:
    """A new initializer, whose name tells where that name is free."""
    tensor = ir.tensor(np.ascontiguousarray(array), name=_free(model, name))
    value = ir.Value(
        name=tensor.name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    model.graph.register_initializer(value)
    return value


def take_place(model: ir.Model, old: ir.Node, new: ir.Node) -> None:
    """Put a node of one output in the place of another, whose output's name it takes."""
    y, result = old.outputs[0], new.outputs[0]
    name = y.name or new.name
    result.type, result.shape = y.type, y.shape
    model.graph.insert_before(old, new)
    for use in list(y.uses()):
        use.node.replace_input_with(use.idx, result)
    for index, output in enumerate(model.graph.outputs):
        if output is y:
            model.graph.outputs[index] = result
    model.graph.remove(old, safe=True)
    result.name = name


def _free(model: ir.Model, name: str) -> str:
    return f"{name}.merged" if name in model.graph.initializers else name


def _untie(model: ir.Model, site: Site, change: Callable[[WideArray], WideArray]) -> None:
    """Give a linear layer's node a weight of its own."""
    value = _copy(model, f"{site.path}.weight", site.weight, change)
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
    own.outputs[0].name = f"{value.name}.transposed"
    model.graph.insert_before(node, own)
    node.replace_input_with(1, own.outputs[0])
