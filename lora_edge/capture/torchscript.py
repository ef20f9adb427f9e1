"""PyTorch's TorchScript exporter, behind one function.

PyTorch 2.13 calls it deprecated. What depends on it, and would be written again for another one:
:func:`to_onnx`, :func:`name_nodes` (a node's scope tells its layer), the symbolic functions of
:mod:`lora_edge.capture.operators`, and the views of :func:`lora_edge.capture.swaps.constant_views`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import onnx
import torch
from torch import Tensor, nn

from lora_edge.base.quiet import quiet
from lora_edge.capture.swaps import replaced

OPSET = 18

# Said of every trace: the exporter is deprecated, sizes become constants.
_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    ("You are using the legacy TorchScript", DeprecationWarning),
    ("The feature will be removed", DeprecationWarning),
    ("", torch.jit.TracerWarning),
    # Of negative indices, which no known model computes; the base check would find them.
    ("Exporting aten::index operator", UserWarning),
)


_PREFIX = "model."


def to_onnx(
    traced: nn.Module,
    example: Mapping[str, Tensor],
    outputs: Sequence[str],
    dims: Mapping[str, Mapping[int, str]],
    *,
    domains: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    """A graph of a module, without weights: each parameter is an input that has its path.

    Args:
        traced: a module whose child ``model`` is the model.
        example: name -> input of the trace, in the order of ``forward``'s arguments.
        outputs: names of what ``forward`` returns.
        dims: name of an input or output -> axis -> name, for each axis of any size.
        domains: domain -> version, of operators that are not ONNX's own.
    """
    buffer = io.BytesIO()
    with _plain(), quiet(_WARNINGS):
        torch.onnx.export(
            traced,
            tuple(example.values()),
            buffer,
            dynamo=False,
            opset_version=OPSET,
            input_names=list(example),
            output_names=list(outputs),
            dynamic_axes=dims,
            custom_opsets=domains,
            do_constant_folding=False,
            export_params=False,
        )
    graph = onnx.load_from_string(buffer.getvalue())
    _name_weights(graph)
    return graph


@contextmanager
def _plain() -> Iterator[None]:
    """The exporter without its printed graph of an operator that it lacks, and with ``expm1``.

    And without the passes over the whole graph that change none of its nodes: each takes seconds.
    The types and shapes that one of them notes are dropped by the first pass of ours; what another
    checks, the checks of the written graph find.

    Apertus' activation reads ``expm1`` of numbers around 1, where the difference is rounding.
    """
    with (
        replaced(torch._C, "_jit_onnx_log", lambda *_: None),
        replaced(torch._C, "_jit_pass_onnx_graph_shape_type_inference", lambda *_: None),
        replaced(torch._C, "_jit_pass_lint", lambda *_: None),
        replaced(torch, "expm1", lambda x: torch.exp(x) - 1.0),
    ):
        yield


def _name_weights(graph: onnx.ModelProto) -> None:
    """Strip the wrapper's own name from the parameters' names."""
    names = {value.name for value in graph.graph.input if value.name.startswith(_PREFIX)}
    for value in graph.graph.input:
        if value.name in names:
            value.name = value.name.removeprefix(_PREFIX)
    for node in graph.graph.node:
        for index, name in enumerate(node.input):
            if name in names:
                node.input[index] = name.removeprefix(_PREFIX)


def name_nodes(graph: onnx.ModelProto) -> None:
    """Call the MatMul of a linear layer, and a Conv, by the layer's module path."""
    weights = {tensor.name for tensor in graph.graph.initializer}
    transposed: dict[str, str] = {}
    for node in graph.graph.node:
        if node.op_type == "Transpose" and node.input[0] in weights:
            transposed[node.output[0]] = node.input[0]
        if node.op_type in {"MatMul", "Conv"}:
            weight = node.input[1]
            if weight in transposed:
                # A tied weight carries the embedding's name; the scope knows the layer's.
                scope = node.name.removeprefix("/").split("/")[:-1]
                owner = transposed[weight].removesuffix(".weight")
                if scope:
                    node.name = owner if owner.endswith(f".{scope[-1]}") else scope[-1]
            elif weight in weights:
                node.name = weight.removesuffix(".weight")
