"""Loading and saving graphs beside their external data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_edge.errors import GraphError
from lora_edge.names import SELECT, is_past, parse_lora_input

_INLINE_UP_TO = 1024  # bytes; shapes and other small constants stay in the graph


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Load a graph; tensors in external data files stay there, and no memory keeps what is read.

    Raises:
        GraphError: the file is missing or is not an ONNX model.
    """
    file = Path(path)
    if not file.is_file():
        raise GraphError(f"{file} is missing", "Give the path of an ONNX model.")
    try:
        model = ir.load(file)
    except (ValueError, RuntimeError, TypeError) as error:
        raise GraphError(f"{file} is not an ONNX model: {error}", "Export it again.") from error
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _Unkept.of(value.const_value)
    return model


class _Unkept(ir.ExternalTensor):
    """A tensor in a data file, mapped for as long as somebody holds the values that it gave."""

    @classmethod
    def of(cls, tensor: ir.ExternalTensor) -> _Unkept:
        """The same tensor."""
        return cls(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=str(tensor.name),
            doc_string=tensor.doc_string,
            metadata_props=tensor.metadata_props,
            base_dir=tensor.base_dir,
        )

    def numpy(self) -> np.ndarray:
        """The values, mapped anew."""
        found = super().numpy()
        self._array = self.raw = None
        return found

    def tobytes(self) -> bytes:
        """The values' bytes, read anew."""
        found = super().tobytes()
        self._array = self.raw = None
        return found


def save_graph(model: ir.Model, path: str | os.PathLike[str]) -> None:
    """Save the graph alone; its external data file, in the same folder, is left untouched.

    Raises:
        GraphError: an external tensor is not in the folder of ``path``, so that the saved reference
            would dangle.
    """
    target = Path(path)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            source = Path(tensor.base_dir) / tensor.location
            if source.resolve().parent != target.resolve().parent:
                raise GraphError(
                    f"the data of {name} is in {source}, not beside {target}",
                    "Save with save_with_data instead.",
                )
    ir.save(model, target)


def save_with_data(model: ir.Model, path: str | os.PathLike[str]) -> None:
    """Save the graph, and all tensors of more than 1 KiB in ``<path>_data`` beside it.

    Tensors are streamed one by one; lazy ones are computed while they are written. Tensors of one
    array in memory, whatever their shapes, are one in the file.

    Raises:
        GraphError: the target data file is one that the model still reads from.
    """
    target = Path(path)
    data = target.with_name(target.name + "_data")
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            source = Path(tensor.base_dir) / tensor.location
            if source.resolve() == data.resolve():
                raise GraphError(
                    f"{data} is being read and cannot be rewritten", "Save to another folder."
                )
    seen: dict[tuple[int, int], str] = {}
    again: dict[str, tuple[str, ir.TensorProtocol]] = {}
    for name, value in model.graph.initializers.items():
        place = _memory(value.const_value)
        if place is not None and seen.setdefault(place, name) != name:
            assert value.const_value is not None
            again[name] = seen[place], value.const_value
            value.const_value = ir.tensor(np.zeros(0, np.uint8), name=name)
    ir.save(model, target, external_data=data.name, size_threshold_bytes=_INLINE_UP_TO)
    if again:
        _point(target, again)
    for name, (_, tensor) in again.items():
        model.graph.initializers[name].const_value = tensor


def _memory(tensor: ir.TensorProtocol | None) -> tuple[int, int] | None:
    """Where a tensor's array is, and its bytes; ``None``: it is lazy, or small."""
    raw = tensor.raw if isinstance(tensor, ir.Tensor) else None
    if not isinstance(raw, np.ndarray) or raw.nbytes <= _INLINE_UP_TO:
        return None
    return int(raw.__array_interface__["data"][0]), raw.nbytes


def _point(path: Path, again: Mapping[str, tuple[str, ir.TensorProtocol]]) -> None:
    """Let tensors of a saved graph read what the data file has for others.

    Args:
        path: the graph.
        again: name -> name of the other, and the tensor.
    """
    saved = load(path)
    for name, (other, tensor) in again.items():
        stored = saved.graph.initializers[other].const_value
        assert isinstance(stored, ir.ExternalTensor)
        saved.graph.initializers[name].const_value = ir.ExternalTensor(
            stored.location,
            stored.offset,
            stored.length,
            tensor.dtype,
            shape=ir.Shape(int(size) for size in tensor.shape.numpy()),
            name=name,
            base_dir=stored.base_dir,
        )
    save_graph(saved, path)


def own_inputs(model: ir.Model) -> tuple[str, ...]:
    """The names of a graph's inputs beside the adapters' and the cache's."""
    names = [str(value.name) for value in model.graph.inputs]
    return tuple(x for x in names if x != SELECT and not is_past(x) and not parse_lora_input(x))
