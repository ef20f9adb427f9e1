"""Finding the sites: which node, and which of its columns, is a given layer of the model.

Content first, names second. A linear layer's weight in the checkpoint is looked up, row by row,
among the columns of every matrix that the graph multiplies with; that finds whole, transposed and
packed layouts alike, whatever the exporter called its nodes. Equal weights are told apart by the
node's name, and what stays ambiguous is refused. A graph of our own capture names its nodes by
module path and its weights by parameter path, and there the names are enough. Embeddings,
convolutions and norms are found by the initializer that they read.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_edge.base.layer import Layer
from lora_edge.bundle.part import SiteEntry
from lora_edge.errors import GraphError
from lora_edge.graph.multiplications import Multiplication, multiplications


@dataclass(frozen=True)
class Site:
    """A layer of the model as it stands in the graph.

    Attributes:
        path: module path.
        layer: kind, sizes and inputs.
        node: the MatMul or Gemm, Gather, Conv, or whatever multiplies with a norm's weight.
        y: the value that the branch is added to, ``[batch, seq, >= out]``.
        start: first column of ``y`` that belongs to this layer (0 unless projections are packed).
        width: number of columns of ``y``; larger than ``out_features`` when packed.
        weight: the initializer that holds the weight.
        transposed: the initializer is ``[out, in]``, not ``[in, out]``.
    """

    path: str
    layer: SiteEntry
    node: ir.Node
    y: ir.Value
    start: int
    width: int
    weight: ir.Value
    transposed: bool

    @property
    def in_features(self) -> int:
        """Size of ``x``'s last dimension."""
        return self.layer.in_features

    @property
    def out_features(self) -> int:
        """Number of columns of ``y`` that belong to this layer."""
        return self.layer.out_features

    @property
    def own_bias(self) -> ir.Value | None:
        """The bias that the layer's node itself adds; ``None``: none, or an Add that follows."""
        if self.node.op_type not in ("Gemm", "Conv") or len(self.node.inputs) < 3:
            return None
        return self.node.inputs[2]

    @property
    def x(self) -> ir.Value:
        """The layer's input, ``[batch, seq, in]`` (an embedding's ids), as the graph is now.

        Not stored: a branch on the layer before may have put its sum in the place of the value.
        """
        if self.layer.kind == "embedding":
            ids = self.node.inputs[1]
            assert ids is not None
            return ids
        x = self.node.inputs[0]
        flattened = self.node.op_type == "Gemm"
        source = x.producer().inputs[0] if flattened else x  # type: ignore[union-attr]
        assert source is not None
        return source


Weights = Callable[[str], "NDArray[np.floating] | None"]
"""Parameter path -> the checkpoint's value, ``None`` where it has none of its own."""


def find_sites(
    model: ir.Model, layers: Mapping[str, SiteEntry], weights: Weights | None = None
) -> dict[str, Site]:
    """Find layers in a graph.

    Args:
        model: the graph.
        layers: module path -> layer, of those to find.
        weights: gives the checkpoint's parameters; a linear weight ``[out, in]`` or ``[in, out]``.
            Without it, everything is found by name.

    Returns:
        module path -> site, in the order of ``layers``.

    Raises:
        GraphError: a layer is not in the graph, or is there more than once.
    """
    matrices = list(multiplications(model))
    named = {m.name: m for m in matrices if m.name}
    sites: dict[str, Site] = {}
    lookup: _ContentIndex | None = None
    for path, layer in layers.items():
        if layer.kind not in ("linear", "head"):
            sites[path] = _find_by_weight(model, path, layer, weights)
            continue
        exact = named.get(path)
        if exact is not None and (exact.in_features, exact.width) == (
            layer.in_features,
            layer.out_features,
        ):
            sites[path] = _site(path, layer, exact, 0)
            continue
        if weights is None:
            raise GraphError(
                f"the graph has no node for {path} [{layer.in_features} -> {layer.out_features}]",
                "Give the base model, so that its weights can be looked up in the graph.",
            )
        lookup = lookup or _ContentIndex(matrices)
        sites[path] = _find_by_content(path, layer, weights(f"{path}.weight"), lookup)
    return sites


def find_initializer(
    model: ir.Model, parameter: str, weights: Weights | None = None
) -> ir.Value | None:
    """The initializer of a parameter: by name, else the only one of the checkpoint's values."""
    named = model.graph.initializers.get(parameter)
    values = None if named is not None or weights is None else weights(parameter)
    if named is not None or values is None:
        return named
    same = []
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if (
            tensor is not None
            and tuple(tensor.shape.numpy()) == values.shape
            and np.array_equal(tensor.numpy(), values)
        ):
            same.append(value)
    return same[0] if len(same) == 1 else None


def graph_weights(model: ir.Model, layers: Mapping[str, Layer], otherwise: Weights) -> Weights:
    """The checkpoint's parameters as a graph of our own capture holds them.

    A checkpoint may have other names than the model (transformers renames them when it loads one);
    the graph has the model's.

    Args:
        model: the graph, before any pass that changes weights.
        layers: module path -> layer of the model.
        otherwise: asked for what the graph does not name.
    """
    named = {m.name: m for m in multiplications(model) if m.name}

    def value(parameter: str) -> NDArray[np.floating] | None:
        initializer = model.graph.initializers.get(parameter)
        if initializer is None or initializer.const_value is None:
            return otherwise(parameter)
        values = initializer.const_value.numpy()
        path, _, own = parameter.rpartition(".")
        layer = layers.get(path)
        if own != "weight" or layer is None or layer.kind not in ("linear", "head"):
            return values
        multiplication = named.get(path)
        if multiplication is None:
            return otherwise(parameter)
        # The checkpoint's layout is [out, in], except where the layer says so.
        return values if multiplication.transposed is not layer.transposed else values.T

    return value


_OPERATORS = {"embedding": ("Gather", "GatherBlockQuantized"), "conv": ("Conv",)}
NORMS = ("LayerNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")


def _find_by_weight(model: ir.Model, path: str, layer: SiteEntry, weights: Weights | None) -> Site:
    """The node that reads a layer's weight: of an embedding, a convolution or a norm."""
    codes = model.graph.initializers.get(f"{path}.weight.codes")
    weight = codes if codes is not None else find_initializer(model, f"{path}.weight", weights)
    value = weight
    if weight is not None and layer.kind == "norm":
        value = effective_weight(weight)
    operators = _OPERATORS.get(layer.kind, (*NORMS, "Mul"))
    readers = [] if value is None else [use.node for use in value.uses()]
    nodes = [node for node in readers if node.op_type in operators]
    if weight is None or len(nodes) != 1:
        raise GraphError(
            f"the {layer.kind} layer {path} cannot be told in the graph: {len(nodes)} nodes read "
            "its weight",
            "Use the trace backend, or leave this layer out of the adapter.",
        )
    y = nodes[0].outputs[0]
    return Site(path, layer, nodes[0], y, 0, layer.out_features, weight, transposed=False)


def effective_weight(weight: ir.Value) -> ir.Value:
    """What a norm multiplies with: its weight, or ``1 + weight`` (Gemma)."""
    uses = tuple(weight.uses())
    if len(uses) == 1 and uses[0].node.op_type in ("Add", "Cast"):
        return effective_weight(uses[0].node.outputs[0])
    return weight


def readers(weight: ir.Value) -> int:
    """How many nodes read a weight, looking through transposes of it."""
    count = 0
    for use in weight.uses():
        node = use.node
        count += readers(node.outputs[0]) if node.op_type == "Transpose" else 1
    return count


def _find_by_content(
    path: str, shape: SiteEntry, matrix: NDArray[np.floating] | None, lookup: _ContentIndex
) -> Site:
    if matrix is None:
        raise GraphError(
            f"the checkpoint has no weight for {path}", "Is the graph made from this base model?"
        )
    found: list[tuple[Multiplication, int]] = []
    if matrix.shape == (shape.out_features, shape.in_features):
        found += lookup.find(matrix)
    if matrix.shape == (shape.in_features, shape.out_features) and not found:
        found += lookup.find(matrix.T)
    if not found:
        raise GraphError(
            f"the weight of {path} {matrix.shape} is in no node of the graph that takes a branch",
            "Is the graph made from this base, in fp32 and not quantized? A layer whose neighbours "
            "work on flattened tokens takes none either: --backend trace keeps them apart.",
        )
    if len(found) > 1:
        named = [entry for entry in found if _name_agrees(path, entry[0].node)]
        if len(named) != 1:
            nodes = ", ".join(str(entry[0].node.name) for entry in found[:4])
            raise GraphError(
                f"{path} cannot be told apart in the graph: {len(found)} nodes have its weight "
                f"({nodes})",
                "Layers with equal weights are told apart by node names; these do not say.",
            )
        found = named
    multiplication, start = found[0]
    return _site(path, shape, multiplication, start)


def _site(path: str, layer: SiteEntry, m: Multiplication, start: int) -> Site:
    return Site(
        path=path,
        layer=layer,
        node=m.node,
        y=m.y,
        start=start,
        width=m.width,
        weight=m.weight,
        transposed=m.transposed,
    )


def _name_agrees(path: str, node: ir.Node) -> bool:
    name = (node.name or "").strip("/").replace("/", ".")
    name = name.rpartition(".")[0] or name
    # Exporters drop leading components (OPT, T5) or add a wrapper's own.
    return bool(name) and (f".{name}".endswith(f".{path}") or f".{path}".endswith(f".{name}"))


class _ContentIndex:
    """Every output column of every constant matrix of the graph, by the hash of its values."""

    def __init__(self, entries: Iterable[Multiplication]) -> None:
        self._columns: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
        # Columns of codes are nobody's weights.
        self._entries = [entry for entry in entries if not _is_coded(entry)]
        self._hashes: list[list[bytes]] = []
        by_weight: dict[tuple[int, bool], list[bytes]] = {}
        for index, entry in enumerate(self._entries):
            key = (id(entry.weight), entry.transposed)
            if key not in by_weight:
                tensor = entry.weight.const_value
                values = np.zeros((0, 0), np.float32) if tensor is None else tensor.numpy()
                by_weight[key] = _hash_rows(values if entry.transposed else values.T)
            self._hashes.append(by_weight[key])
            for column, digest in enumerate(by_weight[key]):
                self._columns[digest].append((index, column))

    def find(self, matrix: NDArray[np.floating]) -> list[tuple[Multiplication, int]]:
        """Nodes that hold all rows of ``matrix [out, in]`` as consecutive output columns."""
        wanted = _hash_rows(matrix)
        return [
            (self._entries[index], start)
            for index, start in self._columns.get(wanted[0], ())
            if self._hashes[index][start : start + len(wanted)] == wanted
        ]


def _is_coded(entry: Multiplication) -> bool:
    kind = entry.weight.dtype
    return kind is not None and not kind.is_floating_point()


def _hash_rows(matrix: NDArray[np.generic]) -> list[bytes]:
    rows = np.ascontiguousarray(matrix, np.float32)
    return [hashlib.blake2b(row, digest_size=16).digest() for row in rows]
