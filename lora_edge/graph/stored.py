"""Where a site's weight lies, so that a runtime without ONNX's own packages can change it."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from lora_edge.graph.sites import Site, readers

_KINDS = ("linear", "embedding")
_DTYPES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16"}


def data_place(model: ir.Model, name: str) -> tuple[int, str] | None:
    """First byte and dtype of an initializer in the data file; ``None``: it is not there."""
    tensor = model.graph.initializers[name].const_value
    if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype not in _DTYPES:
        return None
    return tensor.offset or 0, _DTYPES[tensor.dtype]


class StoredWeight(NamedTuple):
    """A site's weight in an external data file; what the fields mean is said in the manifest."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    transposed: bool
    start: int
    readers: int


def stored_weight(site: Site) -> StoredWeight | None:
    """Where a site's weight lies in the data file beside the graph.

    ``None`` for what is no plain matrix there: a norm, a convolution, a weight that is kept inside
    the graph or is not a float tensor.
    """
    tensor = site.weight.const_value
    if site.layer.kind not in _KINDS or not isinstance(tensor, ir.ExternalTensor):
        return None
    if tensor.dtype not in _DTYPES or len(tensor.shape) != 2:
        return None
    return StoredWeight(
        name=str(site.weight.name),
        dtype=_DTYPES[tensor.dtype],
        shape=tuple(int(size) for size in tensor.shape.numpy()),
        offset=tensor.offset or 0,
        transposed=site.transposed,
        start=site.start,
        readers=readers(site.weight),
    )
