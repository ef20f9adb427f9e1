"""Switchable branches in the gated form, one for each site.

::

    y = base(x) + ((x @ A) * gate) @ B        x [batch, seq, in]   A [in, R]   B [R, out]
                                              gate [batch | 1, seq | 1, R | 1]

What else a site may have reads ``lora.select [batch | 1, seq | 1, S]``, the weight of each of the S
resident adapters, and tensors stacked over S::

    + (select @ G) * base(x) without bias     G [S, out]           DoRA's g - 1
    + select @ bias                           bias [S, out]        changes of a bias
    norm: weight + select @ weight            weight [S, dim]      changes of a norm's weight
    head: x @ W + c, in place of the base's   W [batch | 1, in, labels]   c [batch | 1, 1, labels]

All are graph inputs without defaults: a default would be silently kept by runtimes that ignore
overridable initializers, and forgetting the adapter would pass for the base. Each symbolic
dimension has a name that is used nowhere else, because ONNX Runtime shares buffers between tensors
whose dimensions have the same name. A convolution's A and B are 2-D inputs too, shaped in the
graph, so that every site is fed alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lora_edge.errors import GraphError
from lora_edge.graph.site_nodes import FLOAT, SiteNodes, graph_input, take_place
from lora_edge.graph.sites import Site, effective_weight
from lora_edge.names import SELECT, STACKED_PARTS, lora_input


def branch(model: ir.Model, sites: Mapping[str, Site]) -> None:
    """Give each site the inputs that its layer names, and the nodes that use them.

    Sites that share a packed node must be given together and cover all of its columns.

    Args:
        model: the graph; changed in place. Its weights are not touched.
        sites: module path -> site.

    Raises:
        GraphError: the sites of a packed node leave some of its columns uncovered, or a site cannot
            take the inputs that are asked of it.
    """
    select = None
    if any(set(STACKED_PARTS) & set(site.layer.parts) for site in sites.values()):
        select = graph_input(model.graph, SELECT, [f"{SELECT}.{x}" for x in ("batch", "seq", "S")])
    groups: dict[int, list[Site]] = {}
    for site in sites.values():
        groups.setdefault(id(site.y), []).append(site)
    for group in groups.values():
        ordered = sorted(group, key=lambda site: site.start)
        kind = ordered[0].layer.kind
        if kind == "norm":
            _branch_norm(SiteNodes(model.graph, ordered[0], select))
        elif kind == "head":
            _replace_head(SiteNodes(model.graph, ordered[0], select))
            RemoveUnusedNodesPass()(model)  # the base's own head
        else:
            _branch_node(model.graph, ordered, select)


def _branch_node(graph: ir.Graph, group: Sequence[Site], select: ir.Value | None) -> None:
    """A linear layer (or several, packed in one node), an embedding or a convolution."""
    y = group[0].y
    _check_covered(group)
    anchor = y.producer()
    if anchor is None:
        raise GraphError(f"the output of {group[0].path} is a graph input", "Export it again.")
    nodes: list[ir.Node] = []
    deltas = []
    for site in group:
        made = SiteNodes(graph, site, select)
        delta = _convolution_delta(made) if site.layer.kind == "conv" else _delta(made)
        nodes += made.nodes
        deltas.append(delta)
    last = SiteNodes(graph, group[0], select)
    total = deltas[0]
    if len(deltas) > 1:
        total = last.node("Concat", deltas, "packed", {"axis": -1})
    total = last.node("Add", [y, total], "add")
    nodes += last.nodes
    total.shape = y.shape
    take_place(graph, y, total, nodes, anchor)


def _check_covered(group: Sequence[Site]) -> None:
    covered = 0
    for site in group:
        if site.start != covered:
            raise GraphError(
                f"columns {covered} to {site.start} of the packed node of {site.path} are no site",
                "Give all layers of the packed projection.",
            )
        if len(group) > 1 and "A" not in site.layer.parts:
            raise GraphError(
                f"{site.path} is packed with others and has no low-rank pair", "Export with lora."
            )
        covered += site.out_features
    if covered != group[0].width:
        raise GraphError(
            f"columns {covered} to {group[0].width} of the packed node of {group[-1].path} "
            "are no site",
            "Give all layers of the packed projection.",
        )


def _delta(made: SiteNodes) -> ir.Value:
    """What is added to a linear layer's or an embedding's output."""
    site = made.site
    terms: list[ir.Value] = []
    if made.has("A"):
        a, b, gate = made.pair()
        if site.layer.kind == "embedding":
            down = made.node("Gather", [a, site.x], "down")
        else:
            down = made.node("MatMul", [site.x, a], "down")
        gated = made.node("Mul", [down, _beside(made, gate, "gate")], "gated")
        terms.append(made.node("MatMul", [gated, b], "up"))
    if made.has("G"):
        gain = _beside(made, made.selected("G", site.out_features), "G")
        terms.append(made.node("Mul", [gain, _without_bias(made)], "gained"))
    if made.has("bias"):
        terms.append(_beside(made, made.selected("bias", site.out_features), "bias"))
    return _sum(made, terms)


def _sum(made: SiteNodes, terms: list[ir.Value]) -> ir.Value:
    if not terms:
        raise GraphError(f"{made.site.path} has no inputs", "Name a kind of adapter.")
    total = terms[0]
    for index, term in enumerate(terms[1:]):
        total = made.node("Add", [total, term], f"sum{index}")
    return total


def _without_bias(made: SiteNodes) -> ir.Value:
    """The site's columns of the base's output, less a bias that its own node adds."""
    site, value = made.site, made.site.y
    bias = site.own_bias
    if bias is not None:
        if site.layer.kind == "conv":
            axes = list(range(1, _spatial(site) + 1))
            bias = made.node("Unsqueeze", [bias, made.constant("bias_axes", axes)], "bias_column")
        value = made.node("Sub", [value, bias], "unbiased")
    if site.out_features == site.width:
        return value
    bounds = (site.start, site.start + site.out_features, 2)
    starts, ends, axes_ = (
        made.constant(name, [bound])
        for name, bound in zip(("starts", "ends", "axes"), bounds, strict=True)
    )
    return made.node("Slice", [value, starts, ends, axes_], "columns")


def _convolution_delta(made: SiteNodes) -> ir.Value:
    """What is added to a convolution's output ``[batch, out, *size]``: as its kernel's change."""
    site, spatial = made.site, _spatial(made.site)
    terms: list[ir.Value] = []
    if made.has("A"):
        a, b, gate = made.pair()
        kernel = [int(x) for x in site.weight.shape.numpy()[2:]]  # type: ignore[union-attr]
        shape = [-1, site.in_features // math.prod(kernel), *kernel]
        down_weight = made.node("Transpose", [a], "A.turned", {"perm": [1, 0]})
        down_weight = made.node(
            "Reshape", [down_weight, made.constant("A.shape", shape)], "A.kernel"
        )
        keep = ("strides", "pads", "auto_pad", "kernel_shape", "dilations")
        attributes = {
            name: attribute.value
            for name, attribute in site.node.attributes.items()
            if name in keep and isinstance(attribute, ir.Attr)
        }
        down = made.node("Conv", [site.node.inputs[0], down_weight], "down", attributes)
        gated = made.node("Mul", [down, _channels(made, gate, "gate", spatial)], "gated")
        up_weight = made.node("Transpose", [b], "B.turned", {"perm": [1, 0]})
        axes = made.constant("B.axes", list(range(2, 2 + spatial)))
        up_weight = made.node("Unsqueeze", [up_weight, axes], "B.kernel")
        terms.append(made.node("Conv", [gated, up_weight], "up"))
    if made.has("G"):
        gain = _channels(made, made.selected("G", site.out_features), "G", spatial)
        terms.append(made.node("Mul", [gain, _without_bias(made)], "gained"))
    if made.has("bias"):
        terms.append(_channels(made, made.selected("bias", site.out_features), "bias", spatial))
    return _sum(made, terms)


def _spatial(site: Site) -> int:
    """Number of a convolution's spatial dimensions."""
    assert site.weight.shape is not None
    return len(site.weight.shape) - 2


def _channels(made: SiteNodes, value: ir.Value, name: str, spatial: int) -> ir.Value:
    """``[batch, 1, n]`` -> ``[batch, n, 1 …]``, beside a convolution's channels."""
    turned = made.node("Transpose", [value], f"{name}.channels", {"perm": [0, 2, 1]})
    if spatial == 1:
        return turned
    axes = made.constant(f"{name}.axes", list(range(3, 2 + spatial)))
    return made.node("Unsqueeze", [turned, axes], f"{name}.column")


def _branch_norm(made: SiteNodes) -> None:
    """A norm's weight (and bias) become the base's plus the selected changes.

    ``x̂ * weight + bias`` is taken apart where one operator computes it: the operator gets a weight
    of ones, and so gives ``x̂``.
    """
    site, graph = made.site, made.graph
    node = site.node
    weight: ir.Value = effective_weight(site.weight)
    index = next(i for i, value in enumerate(node.inputs) if value is weight)
    if made.has("weight"):
        change = _beside(made, made.selected("weight", site.out_features), "weight")
        weight = made.node("Add", [weight, change], "changed")
    if node.op_type == "Mul":
        if made.has("bias"):
            raise GraphError(f"the norm {site.path} has no bias", "Export without this adapter.")
        graph.insert_before(node, made.nodes)
        node.replace_input_with(index, weight)
        return
    bias = node.inputs[2] if node.op_type == "LayerNormalization" and len(node.inputs) > 2 else None
    ones = _ones(graph, site.out_features)
    total = made.node("Mul", [site.y, weight], "scaled")
    if made.has("bias"):
        change = _beside(made, made.selected("bias", site.out_features), "bias")
        bias = change if bias is None else made.node("Add", [bias, change], "changed_bias")
    if bias is not None:
        total = made.node("Add", [total, bias], "shifted")
        if node.op_type == "LayerNormalization":
            node.resize_inputs(2)
    node.replace_input_with(index, ones)
    total.shape = site.y.shape
    take_place(graph, site.y, total, made.nodes, node)


def _beside(made: SiteNodes, value: ir.Value, name: str) -> ir.Value:
    """``[batch | 1, seq | 1, n]`` beside activations ``[batch, n]`` or ``[batch, …, seq, n]``."""
    extra = made.site.layer.rank - 3
    if not extra:
        return value
    axes = made.constant(f"{name}.axes", list(range(1, 1 + extra)) if extra > 0 else [1])
    return made.node("Unsqueeze" if extra > 0 else "Squeeze", [value, axes], f"{name}.beside")


def _ones(graph: ir.Graph, size: int) -> ir.Value:
    name = f"lora.ones.{size}"
    if name not in graph.initializers:
        tensor = ir.tensor(np.ones(size, np.float32), name=name)
        value = ir.Value(name=name, shape=ir.Shape([size]), type=FLOAT, const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def _replace_head(made: SiteNodes) -> None:
    """``x @ W + c`` takes the place of the base's head and of the bias that follows it."""
    site, graph = made.site, made.graph
    y = site.y
    uses = tuple(y.uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add":
        other = uses[0].node.inputs[1 - uses[0].idx]
        if other is not None and other.is_initializer():
            y = uses[0].node.outputs[0]
    w = made.input("W", ["batch", site.in_features, "labels"])
    c = made.input("c", ["batch", 1, "labels"])
    product = made.node("MatMul", [site.x, w], "product")
    total = made.node("Add", [product, c], "total")
    anchor = y.producer()
    assert anchor is not None
    take_place(graph, y, total, made.nodes, anchor)
    labels = f"{lora_input(site.path, 'W')}.labels"
    if y.shape is not None:
        total.shape = ir.Shape([*list(y.shape)[:-1], labels])
    _rename_last_dimension(total, site.out_features, labels)


def _rename_last_dimension(value: ir.Value, size: int, name: str) -> None:
    """The values that follow from a head's output have as many columns as it has labels now."""
    for use in value.uses():
        for output in use.node.outputs:
            shape = output.shape
            if shape is not None and len(shape) and shape[len(shape) - 1] == size:
                output.shape = ir.Shape([*list(shape)[:-1], name])
                _rename_last_dimension(output, size, name)
