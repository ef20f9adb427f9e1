"""The second backend: optimum-onnx, called as a library.

Slower, not fused, and bound to transformers 4.57; it traces architectures that the first backend
refuses, and its graphs are an independent second opinion in tests. The graph is *foreign*: nothing
in it is renamed.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import onnx
import torch

from lora_edge.base import Base
from lora_edge.bundle import GraphSpec, SiteEntry
from lora_edge.capture.load import load_model, max_length, model_layers, path_of, tied_pair
from lora_edge.errors import CaptureError, MissingDependencyError, UnsupportedModelError
from lora_edge.names import past_name

_TASK = "text-generation-with-past"
_INLINE_BELOW = 1024  # bytes


def export_with_optimum(
    base: Base, directory: Path
) -> tuple[Path, GraphSpec, dict[str, SiteEntry], tuple[str, ...], str]:
    """Export a decoder into ``directory/model.onnx`` and ``directory/model.onnx_data``.

    Returns:
        The graph's path, its facts, its layers by module path, the embedding and the head where
        they share their weight (see :func:`tied_pair`), and the head's module path.

    Raises:
        MissingDependencyError: optimum-onnx is not installed.
        UnsupportedModelError: optimum does not know the architecture, or this release takes no
            model of its kind.
        BaseModelError: transformers cannot load the model.
        CaptureError: the graph has no KV cache of the common names.
    """
    try:
        from optimum.exporters.onnx import onnx_export_from_model
    except ImportError as error:
        raise MissingDependencyError(
            f"the optimum backend needs {error.name}, which is not installed",
            "Make an environment of its own and: pip install 'lora-edge[optimum]'",
        ) from error
    # Only an eager model keeps its softcap, and only the loaded model decides that.
    model = load_model(base, None)
    modules, tied = model_layers(model), tied_pair(model)
    head = path_of(model, model.get_output_embeddings())
    with tempfile.TemporaryDirectory(dir=directory) as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", "Exporting aten::index operator", UserWarning)
        try:
            onnx_export_from_model(model, scratch, task=_TASK, do_validation=False)
        # How optimum-onnx says that it has no recipe for an architecture or task.
        except (ValueError, KeyError, NotImplementedError) as error:
            raise UnsupportedModelError(
                f"{base.model_type} models are refused: optimum-onnx cannot export them: "
                f"{' '.join(str(error).split()) or repr(error)}",
                "Use a model of a family that the README names; LORA_EDGE_DEBUG=1 shows where.",
            ) from error
        graph = onnx.load(str(Path(scratch) / "model.onnx"))
    path = directory / "model.onnx"
    kv_heads, head_dim, layers = _cache(graph)
    spec = GraphSpec(
        form="foreign",
        backend="optimum",
        padding="left",
        shared_cache=False,
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=int(model.config.vocab_size),
        max_length=max_length(model.config),
        head=head,
    )
    onnx.save(
        graph,
        str(path),
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=_INLINE_BELOW,
    )
    return path, spec, modules, tied, head


def _cache(graph: onnx.ModelProto) -> tuple[int, int, int]:
    """Key/value heads, head size and layers, from the graph's own inputs."""
    inputs = {value.name: value for value in graph.graph.input}
    layers = 0
    while past_name(layers, "key") in inputs:
        layers += 1
    if layers == 0:
        raise CaptureError(
            f"optimum's graph has no input {past_name(0, 'key')!r}; it has {sorted(inputs)}",
            "Use --backend trace, or report the model.",
        )
    dims = inputs[past_name(0, "key")].type.tensor_type.shape.dim
    heads, size = dims[1].dim_value, dims[3].dim_value
    if heads == 0 or size == 0:
        raise CaptureError(
            "optimum's graph has a KV cache of no fixed head count and size: "
            f"[{', '.join(dim.dim_param or str(dim.dim_value) for dim in dims)}]",
            "Use --backend trace, or report the model.",
        )
    return heads, size, layers
