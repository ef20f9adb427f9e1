"""Finding the sites: which node, and which of its columns, is a given linear layer of the model.

Content first, names second. A weight of the checkpoint is looked up, row by row, among the columns
of every matrix that the graph multiplies with; that finds whole, transposed and packed layouts
alike, whatever the exporter called its nodes. Equal weights are told apart by the node's name, and
what stays ambiguous is refused. A graph of our own capture names its nodes by module path, and
there the names are enough.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_edge.errors import GraphError


class LinearShape(Protocol):
    """What is asked of a linear layer: its sizes."""

    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...


@dataclass(frozen=True)
class Site:
    """A linear layer of the model as it stands in the graph.

    Attributes:
        path: module path.
        in_features: size of ``x``'s last dimension.
        out_features: number of columns of ``y`` that belong to this layer.
        node: the MatMul or Gemm.
        y: the value that the branch is added to, ``[batch, seq, >= out]``.
        start: first column of ``y`` that belongs to this layer (0 unless projections are packed).
        width: number of columns of ``y``; larger than ``out_features`` when packed.
        weight: the initializer that holds the weight.
        transposed: the initializer is ``[out, in]``, not ``[in, out]``.
    """

    path: str
    in_features: int
    out_features: int
    node: ir.Node
    y: ir.Value
    start: int
    width: int
    weight: ir.Value
    transposed: bool

    @property
    def x(self) -> ir.Value:
        """The layer's input, ``[batch, seq, in]``, as the graph is now.

        Not stored: a branch on the layer before may have put its sum in the place of the value.
        """
        x = self.node.inputs[0]
        flattened = self.y is not self.node.outputs[0]
        source = x.producer().inputs[0] if flattened else x  # type: ignore[union-attr]
        assert source is not None
        return source


class _Multiplication(NamedTuple):
    """A node that multiplies an activation with a constant matrix."""

    node: ir.Node
    y: ir.Value
    weight: ir.Value
    transposed: bool
    in_features: int
    width: int


def find_sites(
    model: ir.Model,
    linears: Mapping[str, LinearShape],
    weight: Callable[[str], NDArray[np.float32] | None] | None = None,
) -> dict[str, Site]:
    """Find linear layers in a graph.

    Args:
        model: the graph.
        linears: module path -> sizes, of the layers to find.
        weight: gives a layer's weight from the checkpoint, ``[out, in]`` or ``[in, out]``, or
            ``None`` if the checkpoint has none of its own. Without it, nodes are found by name.

    Returns:
        module path -> site, in the order of ``linears``.

    Raises:
        GraphError: a layer is not in the graph, or is there more than once.
    """
    multiplications = list(_multiplications(model))
    named = {m.node.name: m for m in multiplications if m.node.name}
    sites: dict[str, Site] = {}
    lookup: _ContentIndex | None = None
    for path, shape in linears.items():
        exact = named.get(path)
        if exact is not None and (exact.in_features, exact.width) == (
            shape.in_features,
            shape.out_features,
        ):
            sites[path] = _site(path, shape, exact, 0)
            continue
        if weight is None:
            raise GraphError(
                f"the graph has no node for {path} [{shape.in_features} -> {shape.out_features}]",
                "Give the base model, so that its weights can be looked up in the graph.",
            )
        lookup = lookup or _ContentIndex(multiplications)
        sites[path] = _find_by_content(path, shape, weight(path), lookup)
    return sites


def _find_by_content(
    path: str, shape: LinearShape, matrix: NDArray[np.float32] | None, lookup: _ContentIndex
) -> Site:
    if matrix is None:
        raise GraphError(
            f"the checkpoint has no weight for {path}", "Is the graph made from this base model?"
        )
    found: list[tuple[_Multiplication, int]] = []
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


def _site(path: str, shape: LinearShape, m: _Multiplication, start: int) -> Site:
    return Site(
        path=path,
        in_features=shape.in_features,
        out_features=shape.out_features,
        node=m.node,
        y=m.y,
        start=start,
        width=m.width,
        weight=m.weight,
        transposed=m.transposed,
    )


def _multiplications(model: ir.Model) -> Iterable[_Multiplication]:
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm") or len(node.inputs) < 2:
            continue
        x, matrix = node.inputs[0], node.inputs[1]
        if x is None or matrix is None:
            continue
        transposed = False
        producer = matrix.producer()
        if producer is not None and producer.op_type == "Transpose":
            source = producer.inputs[0]
            if source is None:
                continue
            matrix, transposed = source, True
        if not matrix.is_initializer() or matrix.shape is None or len(matrix.shape) != 2:
            continue
        y = node.outputs[0]
        if node.op_type == "Gemm":
            if not _is_plain(node):
                continue
            transposed ^= bool(_int_attribute(node, "transB", 0))
            if (unflattened := _unflattened_output(x, y)) is None:
                continue
            y = unflattened
        rows, columns = (int(dim) for dim in matrix.shape.numpy())
        in_features, width = (columns, rows) if transposed else (rows, columns)
        yield _Multiplication(node, y, matrix, transposed, in_features, width)


def _is_plain(node: ir.Node) -> bool:
    alpha, beta = node.attributes.get("alpha"), node.attributes.get("beta")
    return (
        (alpha is None or alpha.as_float() == 1.0)
        and (beta is None or beta.as_float() == 1.0)
        and not _int_attribute(node, "transA", 0)
    )


def _int_attribute(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _unflattened_output(x: ir.Value, y: ir.Value) -> ir.Value | None:
    """The 3-D value that the output of a Gemm on ``[batch * seq, in]`` is reshaped to.

    A gate ``[batch, 1, R]`` against a 2-D activation would broadcast silently to three dimensions,
    so the branch goes around the flattening.
    """
    before = x.producer()
    uses = tuple(y.uses())
    if before is None or before.op_type != "Reshape" or len(uses) != 1:
        return None
    after = uses[0].node
    return after.outputs[0] if after.op_type == "Reshape" else None


def _name_agrees(path: str, node: ir.Node) -> bool:
    name = (node.name or "").strip("/").replace("/", ".")
    name = name.rpartition(".")[0] or name
    # Exporters drop leading components (OPT, T5) or add a wrapper's own.
    return bool(name) and (f".{name}".endswith(f".{path}") or f".{path}".endswith(f".{name}"))


class _ContentIndex:
    """Every output column of every constant matrix of the graph, by the hash of its values."""

    def __init__(self, multiplications: Iterable[_Multiplication]) -> None:
        self._columns: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
        self._entries = list(multiplications)
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

    def find(self, matrix: NDArray[np.float32]) -> list[tuple[_Multiplication, int]]:
        """Nodes that hold all rows of ``matrix [out, in]`` as consecutive output columns."""
        wanted = _hash_rows(matrix)
        return [
            (self._entries[index], start)
            for index, start in self._columns.get(wanted[0], ())
            if self._hashes[index][start : start + len(wanted)] == wanted
        ]


def _hash_rows(matrix: NDArray[np.generic]) -> list[bytes]:
    rows = np.ascontiguousarray(matrix, np.float32)
    return [hashlib.blake2b(row, digest_size=16).digest() for row in rows]
