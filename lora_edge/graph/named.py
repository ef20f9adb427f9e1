"""Names of our own captures for the linear layers of a foreign graph, so that passes know them.

::

    y = MatMul(x, onnx::MatMul_312)  # /block.0/…/q/MatMul
    y = MatMul(x, encoder.block.0.….q.weight)  # encoder.block.0.….q
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lora_edge.base.layer import Layer
from lora_edge.bundle.part import SiteEntry
from lora_edge.graph.sites import Site, Weights, find_sites


def name_layers(
    model: ir.Model, layers: Mapping[str, Layer], tied: Sequence[str], weights: Weights
) -> None:
    """Call linear layers by their module paths and their weights by parameter paths.

    An output layer that has a copy of the token embedding's weight reads the embedding's again.

    Args:
        model: a foreign graph; changed in place.
        layers: module path -> linear layer, of those that the graph has.
        tied: module paths of the token embedding and of the output layer that shares its weight,
            or ().
        weights: the checkpoint's parameters, by which the layers are found.

    Raises:
        GraphError: a layer is not in the graph, or cannot be told from another.
    """
    entries = {path: SiteEntry.of(layer) for path, layer in layers.items()}
    for path, site in find_sites(model, entries, weights).items():
        if site.width != site.out_features:
            continue  # packed with others
        site.node.name = path
        if site.node.inputs[1] is not site.weight or len(site.weight.uses()) > 1:
            continue
        embedding = model.graph.initializers.get(f"{tied[0]}.weight") if path in tied else None
        if embedding is not None:
            _tie(model, site, embedding)
        elif f"{path}.weight" not in model.graph.initializers:
            site.weight.name = f"{path}.weight"
    RemoveUnusedNodesPass()(model)  # and the copies that nobody reads any more


def _tie(model: ir.Model, site: Site, embedding: ir.Value) -> None:
    turned = ir.node("Transpose", [embedding], {"perm": [1, 0]}, name=f"{site.path}.transpose")
    turned.outputs[0].name = f"{site.path}.transposed"
    model.graph.insert_before(site.node, turned)
    site.node.replace_input_with(1, turned.outputs[0])
