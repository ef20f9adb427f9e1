"""The weights of a capture: placeholders while tracing, streamed to the data file afterwards."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx.helper
import onnx.numpy_helper
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_edge.base.linear import is_linear
from lora_edge.base.mapped import Mapped

_ALIGNMENT = 4096  # bytes; a page, so that the runtime can map tensors
_INLINE_BELOW = 1024  # bytes; shapes and other small constants stay in the graph


@dataclass(frozen=True)
class Weight:
    """A parameter of the model and how the graph wants it.

    Attributes:
        value: the parameter, ``[out, in]`` for a linear layer.
        transpose: write it transposed.
    """

    value: Tensor
    transpose: bool


@contextmanager
def placeholders(model: nn.Module) -> Iterator[dict[str, Weight]]:
    """Replace every parameter by a stand-in of the graph's layout that takes no memory.

    The exporter copies parameters, and merges equal ones; each stand-in is one number, different
    from all others, seen through strides of zero. A parameter that several modules share keeps one
    stand-in.

    Yields:
        parameter name -> weight, one entry for each tensor.
    """
    readers: dict[int, int] = {}
    for _, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            readers[id(parameter)] = readers.get(id(parameter), 0) + 1
    weights: dict[str, Weight] = {}
    stand_ins: dict[int, nn.Parameter] = {}
    originals: list[tuple[nn.Module, str, nn.Parameter]] = []
    for path, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            originals.append((module, name, parameter))
            if id(parameter) not in stand_ins:
                transpose = _transposed(module, name) and readers[id(parameter)] == 1
                shape = parameter.shape[::-1] if transpose else parameter.shape
                number = torch.full((1,), (len(weights) + 1) * 1e-3)
                stand_in = nn.Parameter(number.expand(shape), requires_grad=False)
                stand_in.lora_edge_tied = readers[id(parameter)] > 1
                stand_ins[id(parameter)] = stand_in
                weights[f"{path}.{name}" if path else name] = Weight(parameter, transpose)
    try:
        for module, name, parameter in originals:
            module._parameters[name] = stand_ins[id(parameter)]
        yield weights
    finally:
        for module, name, parameter in originals:
            module._parameters[name] = parameter


def _transposed(module: nn.Module, name: str) -> bool:
    # Conv1D keeps its weight as [in, out] already.
    return name == "weight" and isinstance(module, nn.Linear) and is_linear(module)


def attach(
    model: onnx.ModelProto,
    tensors: Mapping[str, Weight],
    data_file: Path,
    mapped: Mapped | None = None,
) -> list[str]:
    """Turn graph inputs that stand for weights into initializers in an external data file.

    Large constants (the rotary tables) go there too.

    Args:
        model: the graph; changed in place.
        tensors: graph input name -> weight.
        data_file: written; tensor by tensor, so that one of them is in memory at a time.
        mapped: which of the tensors are mapped from the checkpoint.

    Returns:
        The names that the graph does not have.
    """
    inputs = {value.name: value for value in model.graph.input}
    missing = [name for name in tensors if name not in inputs]
    with data_file.open("wb") as stream:
        for name, weight in tensors.items():
            if name not in inputs:
                continue
            value = weight.value.detach()
            array = (value.t() if weight.transpose else value).float().contiguous().numpy()
            _write(model, name, array, stream)
            if mapped is not None:
                mapped.give_back(weight.value)
            model.graph.input.remove(inputs[name])
        for node in [node for node in model.graph.node if node.op_type == "Constant"]:
            tensor = node.attribute[0].t
            if len(tensor.raw_data) >= _INLINE_BELOW:
                _write(model, node.output[0], onnx.numpy_helper.to_array(tensor), stream)
                model.graph.node.remove(node)
    return missing


def _write(
    model: onnx.ModelProto, name: str, array: NDArray[Any], stream: io.BufferedWriter
) -> None:
    stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
    entry: Any = model.graph.initializer.add(
        name=name,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
        dims=array.shape,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    place = {
        "location": Path(stream.name).name,
        "offset": str(stream.tell()),
        "length": str(array.nbytes),
    }
    for key, text in place.items():
        entry.external_data.add(key=key, value=text)
    array.tofile(stream)
