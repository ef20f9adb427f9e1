"""Passes over an ONNX graph. Each takes an ``onnx_ir.Model`` and changes it in place.

Knows ONNX and numpy; knows nothing of PyTorch, PEFT directories, bundles or runtimes.
"""

from lora_edge.graph.branch import branch
from lora_edge.graph.check import check
from lora_edge.graph.fixed import fix_shapes
from lora_edge.graph.fuse import fuse
from lora_edge.graph.half import compute_half, read_from, same_but_for_half, store_half
from lora_edge.graph.merge import merge
from lora_edge.graph.named import name_layers
from lora_edge.graph.pack import pack, unsplit_attention
from lora_edge.graph.quantize import (
    compute_in,
    present,
    quantizable,
    quantizable_embeddings,
    quantizable_vocabulary,
    quantize_layers,
    round_layers,
    same_but_for_activations,
)
from lora_edge.graph.sites import Site, find_sites, graph_weights
from lora_edge.graph.store import load, own_inputs, save_graph, save_with_data
from lora_edge.graph.stored import data_place, stored_weight
from lora_edge.graph.ungate import by_row, ungate

__all__ = [
    "Site",
    "branch",
    "by_row",
    "check",
    "compute_half",
    "compute_in",
    "data_place",
    "find_sites",
    "fix_shapes",
    "fuse",
    "graph_weights",
    "load",
    "merge",
    "name_layers",
    "own_inputs",
    "pack",
    "present",
    "quantizable",
    "quantizable_embeddings",
    "quantizable_vocabulary",
    "quantize_layers",
    "read_from",
    "round_layers",
    "same_but_for_activations",
    "same_but_for_half",
    "save_graph",
    "save_with_data",
    "store_half",
    "stored_weight",
    "ungate",
    "unsplit_attention",
]
