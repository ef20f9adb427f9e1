"""Layers of few bits: ``com.microsoft.MatMulNBits`` and ``GatherBlockQuantized``.

They take the place of a ``MatMul`` with a constant and of an embedding's ``Gather``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lora_edge.base.layer import Layer
from lora_edge.errors import GraphError
from lora_edge.files.spilled import let_go, moved
from lora_edge.graph.channels import channels_in, put_channels
from lora_edge.graph.merge import Change, WideArray, add_initializer, lazily, take_place
from lora_edge.graph.multiplications import MATMUL_NBITS, Multiplication, multiplications
from lora_edge.maths.quantization import Activations, Blocks, Quantization

GATHER_NBITS = "GatherBlockQuantized"
_ACCURACY: Mapping[Activations, int] = {"fp32": 1, "int8": 4}


def quantizable(model: ir.Model, layers: Mapping[str, Layer]) -> tuple[str, ...]:
    """The linear layers that can be quantized: those with a MatMul and a weight of their own.

    Args:
        model: a graph of our own capture, whose nodes are named by module path.
        layers: module path -> layer.
    """
    return tuple(_linear(model, layers))


def present(model: ir.Model, layers: Mapping[str, Layer], paths: Collection[str]) -> list[str]:
    """Those of the linear layers and embeddings that the graph has; an encoder-decoder has two.

    Args:
        model: a graph whose nodes and weights have the names of our own captures.
        layers: module path -> layer.
        paths: of those, which are asked for.
    """
    named = {m.name for m in multiplications(model)}
    held = model.graph.initializers
    return [
        path
        for path in paths
        if (f"{path}.weight" in held if layers[path].kind == "embedding" else path in named)
    ]


def quantizable_vocabulary(
    model: ir.Model,
    layers: Mapping[str, Layer],
    head: str,
    tied: Collection[str],
    block_size: int,
) -> tuple[str, ...]:
    """The output layer and the token embedding, those of them that can be quantized.

    Args:
        model: a graph of our own capture.
        layers: module path -> layer.
        head: module path of the output layer.
        tied: module paths of the two, if they share a weight: then both can or none.
        block_size: an embedding's width must be a multiple of it.
    """
    embeddings = _embeddings(model, layers, layers[head].out_features, block_size)
    named = {m.name: m for m in multiplications(model)}
    own = named.get(head)
    if own is None or own.node.op_type != "MatMul":
        return tuple(embeddings) if not tied else ()
    readers = {id(use.node) for use in own.weight.uses()}
    if not tied:
        alone = [path for path in embeddings if _read_once(model, path)]
        return (*([head] if len(readers) == 1 else []), *alone)
    gathers = {id(node) for node in embeddings.values() if node.inputs[0] is own.weight}
    turned = own.node.inputs[1]
    transpose = None if turned is None else turned.producer()
    if turned is None or transpose is None or len(turned.uses()) != 1:
        return ()
    if readers != {id(transpose), *gathers}:
        return ()
    return (head, *embeddings) if gathers else ()


def quantizable_embeddings(
    model: ir.Model, layers: Mapping[str, Layer], block_size: int
) -> tuple[str, ...]:
    """The embeddings that can be quantized.

    Args:
        model: a graph of our own capture.
        layers: module path -> layer.
        block_size: an embedding's width must be a multiple of it.
    """
    return tuple(_embeddings(model, layers, None, block_size))


def quantize_layers(
    model: ir.Model,
    layers: Mapping[str, Layer],
    paths: Collection[str],
    quantization: Quantization,
    changes: Mapping[str, Change] | None = None,
) -> None:
    """Put codes of few bits in the place of weights.

    Args:
        model: the graph; changed in place. Until it is saved, codes are in files without a name
            (:mod:`lora_edge.files.spilled`); a tied weight's are there once, and once in the file
            of :func:`~lora_edge.graph.store.save_with_data`.
        layers: module path -> layer.
        paths: of those, which to quantize; each is :func:`quantizable`, or of
            :func:`quantizable_vocabulary`.
        quantization: bits and size of a block.
        changes: parameter path -> what a merge makes of a weight ``[out, in]`` before it is
            rounded. Of a tied weight, those of one change have the same codes.
    """
    linear = {m.name: m for m in multiplications(model)}
    gathers = _embeddings(model, layers, None, quantization.block_size)
    shared: dict[tuple[int, int], _Codes] = {}
    for path in paths:
        weight = gathers[path].inputs[0] if path in gathers else linear[path].weight
        assert weight is not None
        change = (changes or {}).get(f"{path}.weight")
        if path in quantization.by_channel:
            matrix = _changed(_matrix(weight, linear[path].transposed), change)
            put_channels(model, path, linear[path], quantization.blocks(path, matrix))
            continue
        codes = shared.get((id(weight), id(change)))
        if codes is None:
            turned = path in gathers or linear[path].transposed
            matrix = _changed(_matrix(weight, turned), change)
            codes = _Codes.of(quantization.blocks(path, matrix))
        if len(weight.uses()) > 1:
            shared[id(weight), id(change)] = codes
        if path in gathers:
            _replace_gather(model, path, gathers[path], codes)
        else:
            _replace(model, path, linear[path], codes)
    RemoveUnusedNodesPass()(model)  # and the weights that nobody reads any more
    model.opset_imports.setdefault("com.microsoft", 1)


def round_layers(
    model: ir.Model,
    layers: Mapping[str, Layer],
    paths: Collection[str],
    quantization: Quantization,
) -> None:
    """Put rounded weights in the place of weights, which stay matrices of floats.

    Arguments as of :func:`quantize_layers`.
    """
    linear = {m.name: m for m in multiplications(model)}
    gathers = _embeddings(model, layers, None, quantization.block_size)
    done: set[int] = set()
    for path in paths:
        value = gathers[path].inputs[0] if path in gathers else linear[path].weight
        turned = path in gathers or linear[path].transposed
        assert value is not None
        if id(value) in done:  # tied
            continue
        done.add(id(value))

        def rounded(stored: WideArray, path: str = path, turned: bool = turned) -> WideArray:
            matrix = quantization.rounded(path, stored if turned else stored.T)
            return (matrix if turned else matrix.T).astype(np.float64)

        value.const_value = lazily(str(value.name), value, rounded)


class _Codes(NamedTuple):
    """What a quantized layer reads: arrays by name, ``[out, …]`` when shaped so."""

    arrays: Mapping[str, NDArray[np.generic]]
    rows: int
    attributes: Mapping[str, int]

    @classmethod
    def of(cls, blocks: Blocks) -> _Codes:
        attributes = {"bits": blocks.bits, "block_size": blocks.block_size}
        arrays = {name: moved(array) for name, array in blocks.packed().items()}
        let_go(*arrays.values())
        return cls(arrays, len(blocks.codes), attributes)


def compute_in(model: ir.Model, activations: Activations) -> None:
    """Let the quantized layers multiply their codes with floats, or with codes of 8 bits.

    Args:
        model: the graph; changed in place.
        activations: ``fp32``; or ``int8``, to which ONNX Runtime rounds each block of activations.
    """
    for node in model.graph:
        if node.op_type == MATMUL_NBITS:
            level = _ACCURACY[activations]
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
    channels_in(model, floats=activations == "fp32")


def same_but_for_activations(one: ir.Model, other: ir.Model) -> bool:
    """Whether two graphs compute the same, but for what :func:`compute_in` changes.

    Args:
        one, other: the graphs; both compute in floats afterwards.
    """
    for model in (one, other):
        compute_in(model, "fp32")
    first, second = (ir.to_proto(x).SerializeToString(deterministic=True) for x in (one, other))
    return bool(first == second)


def _linear(model: ir.Model, layers: Mapping[str, Layer]) -> dict[str, Multiplication]:
    found = {}
    for multiplication in multiplications(model):
        node, weight = multiplication.node, multiplication.weight
        layer = layers.get(node.name or "")
        if (
            layer is not None
            and layer.kind == "linear"
            and node.op_type == "MatMul"
            and (multiplication.in_features, multiplication.width)
            == (layer.in_features, layer.out_features)
            and len(weight.uses()) == 1
        ):
            found[str(node.name)] = multiplication
    return found


def _embeddings(
    model: ir.Model, layers: Mapping[str, Layer], rows: int | None, block_size: int
) -> dict[str, ir.Node]:
    """Module path -> Gather, of embeddings of so many rows (any) whose weight one Gather reads."""
    found = {}
    for path, layer in layers.items():
        weight = model.graph.initializers.get(f"{path}.weight")
        if layer.kind != "embedding" or weight is None or layer.out_features % block_size:
            continue
        nodes = [use.node for use in weight.uses() if use.node.op_type == "Gather"]
        axis = nodes[0].attributes.get("axis") if len(nodes) == 1 else None
        by_row = len(nodes) == 1 and (axis is None or axis.as_int() == 0)
        if by_row and rows in (None, layer.in_features):
            found[path] = nodes[0]
    return found


def _read_once(model: ir.Model, path: str) -> bool:
    """Whether nothing but a layer's own node reads its weight."""
    return len(model.graph.initializers[f"{path}.weight"].uses()) == 1


def _matrix(weight: ir.Value, turned: bool) -> NDArray[np.floating]:
    """The weight, ``[out, in]``; ``turned``: it is kept so."""
    if weight.const_value is None:
        raise GraphError(f"the weight {weight.name} has no values", "Export the base again.")
    values: NDArray[np.floating] = weight.const_value.numpy()
    return values if turned else values.T


def _changed(matrix: NDArray[np.floating], change: Change | None) -> NDArray[np.floating]:
    """What a merge makes of a weight before it is rounded."""
    return matrix if change is None else change(matrix.astype(np.float64)).astype(np.float32)


def _replace(model: ir.Model, path: str, found: Multiplication, codes: _Codes) -> None:
    inputs = [found.node.inputs[0]]
    for name, array in codes.arrays.items():
        inputs.append(add_initializer(model, f"{path}.weight.{name}", array))
    attributes = {
        "K": found.in_features,
        "N": found.width,
        **codes.attributes,
        "accuracy_level": _ACCURACY["fp32"],
    }
    node = ir.node(MATMUL_NBITS, inputs, attributes, domain="com.microsoft", name=path)
    take_place(model, found.node, node)


def _replace_gather(model: ir.Model, path: str, old: ir.Node, codes: _Codes) -> None:
    """An embedding that reads rows of the very arrays that ``MatMulNBits`` reads, shaped anew."""
    parts = {
        name: add_initializer(model, f"{path}.weight.{name}", array.reshape(codes.rows, -1))
        for name, array in codes.arrays.items()
    }
    inputs = [parts.pop("codes"), old.inputs[1], *parts.values()]
    attributes = {**codes.attributes, "gather_axis": 0, "quantize_axis": 1}
    node = ir.node(GATHER_NBITS, inputs, attributes, domain="com.microsoft", name=path)
    take_place(model, old, node)
