"""The second backend: optimum-onnx, called as a library.

Slower, not fused, and bound to transformers 4.57; it traces architectures that the first backend
refuses, and its graphs are an independent second opinion in tests. The graph is *foreign*: nothing
in it is renamed.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch

from lora_edge.base.checkpoint import Base
from lora_edge.base.model import load_model, model_layers, path_of, tied_pair
from lora_edge.bundle.part import Beginning, Cache, Part
from lora_edge.capture.base_graph import BaseGraph
from lora_edge.capture.refusing import max_length
from lora_edge.errors import (
    BaseModelError,
    CaptureError,
    MissingDependencyError,
    UnsupportedModelError,
)
from lora_edge.names import past_name
from lora_edge.tasks.task import Task

_TASK = "text-generation-with-past"
_INLINE_BELOW = 1024  # bytes


def export_with_optimum(base: Base, directory: Path, task: Task, form: str) -> BaseGraph:  # noqa: ARG001
    """Export a decoder into ``directory/model.onnx`` and ``directory/model.onnx_data``.

    It has one form, its own.

    Raises:
        MissingDependencyError: optimum-onnx is not installed.
        UnsupportedModelError: optimum does not know the architecture, or this release takes no
            model of its kind.
        BaseModelError: transformers cannot load the model.
        CaptureError: the graph has no KV cache of the common names.
    """
    _check_installed()
    # Only an eager model keeps its softcap, and only the loaded model decides that.
    model = load_model(base, None, task)
    modules, tied = model_layers(model), tied_pair(model)
    head = path_of(model, model.get_output_embeddings())
    with _exported(base, model, directory, _TASK) as scratch:
        graph = onnx.load(str(scratch / "model.onnx"))
    path = directory / "model.onnx"
    kv_heads, head_dim, layers = _cache(graph)
    part = Part(
        file="model.onnx",
        form="foreign",
        backend="optimum",
        inputs=("input_ids", "attention_mask"),
        output="logits",
        vocab_size=int(model.config.vocab_size),
        max_length=max_length(model.config),
        padding="left",
        head=head,
        cache=Cache("concatenated", layers, kv_heads, head_dim),
    )
    _save(graph, path)
    return BaseGraph(directory, {"decoder": part}, modules, tied, head, base.model_type)


def export_seq2seq(base: Base, directory: Path, task: Task, form: str) -> BaseGraph:  # noqa: ARG001
    """Export an encoder and a decoder without a cache, each with its ``_data``, into a folder.

    They have one form, optimum's.

    Raises:
        BaseModelError: its config names no token that the decoder begins with.
        CaptureError: the graphs' inputs are not the common ones.
        As :func:`export_with_optimum` otherwise.
    """
    _check_installed()
    model = load_model(base, None, task)
    shapes = {}
    if getattr(model.config, "max_source_positions", None) and task.name.endswith("recognition"):
        shapes["nb_max_frames"] = 2 * model.config.max_source_positions
    files = directory / "encoder_model.onnx", directory / "decoder_model.onnx"
    with _exported(base, model, directory, task.name, shapes) as scratch:
        graphs = [onnx.load(str(scratch / file.name)) for file in files]
    inputs, features = _sources(graphs[0], base)
    encoder = path_of(model, model.get_encoder())
    head = path_of(model, model.get_output_embeddings())
    common: Any = {
        "form": "foreign",
        "backend": "optimum",
        "pad_token_id": int(model.config.pad_token_id or 0),
    }
    vocab_size = int(model.config.vocab_size)
    parts = {
        "encoder": Part(
            file=files[0].name,
            inputs=inputs,
            output="last_hidden_state",
            vocab_size=0 if features else vocab_size,
            max_length=0 if features else _positions(model.config, "max_source_positions"),
            sample=features,
            **common,
        ),
        "decoder": Part(
            file=files[1].name,
            inputs=("input_ids", "encoder_hidden_states"),
            output="logits",
            vocab_size=vocab_size,
            max_length=_positions(model.config, "max_target_positions"),
            head=head,
            **common,
        ),
    }
    for graph, below, file in zip(graphs, (encoder, ""), files, strict=True):
        _name_parameters(graph, model, below)
        _save(graph, file)
    return BaseGraph(
        directory,
        parts,
        model_layers(model),
        tied_pair(model),
        head,
        base.model_type,
        beginning=Beginning(**_beginning(model, base)),
        encoder=encoder,
    )


def _name_parameters(graph: onnx.ModelProto, model: Any, part: str) -> None:
    """Give initializers the paths that their parameters have in the whole model.

    A parameter that several modules share has one path in all graphs: of the first of them.

    Args:
        graph: of a part of the model, whose initializers are called from there.
        model: the whole model.
        part: module path of the part.
    """
    first = {id(parameter): path for path, parameter in model.named_parameters()}
    known = {path: first.get(id(x), path) for path, x in model.state_dict(keep_vars=True).items()}
    held = {value.name for value in graph.graph.initializer}
    names: dict[str, str] = {}
    for name in sorted(held):
        path = known.get(name) or known.get(f"{part}.{name}")
        if path is not None and path not in held and path not in names.values():
            names[name] = path
    for value in graph.graph.initializer:
        value.name = names.get(value.name, value.name)
    for node in graph.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)


def _check_installed() -> None:
    try:
        import optimum.exporters.onnx  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"the optimum backend needs {error.name}, which is not installed",
            "Make an environment of its own and: pip install 'lora-edge[optimum]'",
        ) from error


@contextmanager
def _exported(
    base: Base,
    model: Any,
    directory: Path,
    task: str,
    shapes: Mapping[str, int] | None = None,
) -> Iterator[Path]:
    """A folder with optimum's graphs, which goes when the block ends."""
    from optimum.exporters.onnx import onnx_export_from_model
    from optimum.utils import logging

    level = logging.get_verbosity()
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            warnings.filterwarnings("ignore", "Exporting aten::index operator", UserWarning)
            # It warns of tied weights that it leaves apart; the parity check judges the result.
            logging.set_verbosity_error()
            try:
                onnx_export_from_model(
                    model, scratch, task=task, do_validation=False, **(shapes or {})
                )
            # How optimum-onnx says that it has no recipe for an architecture or task.
            except (ValueError, KeyError, NotImplementedError) as error:
                raise UnsupportedModelError(
                    f"{base.model_type} models are refused: optimum-onnx cannot export them: "
                    f"{' '.join(str(error).split()) or repr(error)}",
                    "Use a model of a family that docs/families.md names; LORA_EDGE_DEBUG=1 shows "
                    "where.",
                ) from error
            finally:
                logging.set_verbosity(level)
        yield Path(scratch)


def _save(graph: onnx.ModelProto, path: Path) -> None:
    onnx.save(
        graph,
        str(path),
        save_as_external_data=True,
        location=f"{path.name}_data",
        size_threshold=_INLINE_BELOW,
    )


def _sources(graph: onnx.ModelProto, base: Base) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The encoder's inputs, and the sizes of its features where it takes speech."""
    found = {value.name: value.type.tensor_type.shape.dim for value in graph.graph.input}
    if set(found) == {"input_ids", "attention_mask"}:
        return ("input_ids", "attention_mask"), ()
    sizes = tuple(int(dim.dim_value) for dim in found.get("input_features", ()))[1:]
    if set(found) == {"input_features"} and len(sizes) == 2 and all(sizes):
        return ("input_features",), sizes
    raise UnsupportedModelError(
        f"{base.model_type} models are refused: their encoder takes {', '.join(sorted(found))}, "
        "and this release knows texts and features of a fixed length",
        "Use a model such as T5, BART or Whisper.",
    )


def _positions(config: Any, own: str) -> int:
    """Positions of the longest sequence; 0 where they are relative to each other."""
    if hasattr(config, "relative_attention_num_buckets"):
        return 0
    value = getattr(config, own, None)
    return value if isinstance(value, int) and value > 0 else max_length(config)


def _beginning(model: Any, base: Base) -> dict[str, Any]:
    """What the decoder begins with and never says, from the config and the generation config.

    Source: ``WhisperGenerationMixin._retrieve_init_tokens`` and the forced first token of
    ``GenerationMixin._get_logits_processor`` (transformers 4.57).
    """
    asked = model.generation_config

    def setting(name: str) -> Any:
        value = getattr(asked, name, None)
        return getattr(model.config, name, None) if value is None else value

    first = setting("decoder_start_token_id")
    first = setting("bos_token_id") if first is None else first
    if not isinstance(first, int):
        raise BaseModelError(
            f"{base.name_or_path} does not say what its decoder begins with: "
            f"decoder_start_token_id is {first!r}",
            "Set it in config.json or generation_config.json.",
        )
    start: list[Any] = [first]
    for position, token in sorted(setting("forced_decoder_ids") or ()):
        if position == len(start):
            start.append(token)
    if setting("forced_bos_token_id") is not None and len(start) == 1:
        start.append(setting("forced_bos_token_id"))
    is_open = None in start or (bool(setting("is_multilingual")) and len(start) == 1)
    start = start[: start.index(None)] if None in start else start
    plain = setting("no_timestamps_token_id")
    if plain is not None and not is_open and start[-1] != plain:
        start.append(plain)
    return {
        "start": tuple(start),
        "open_language": is_open,
        "suppress": tuple(setting("suppress_tokens") or ()),
        "begin_suppress": tuple(setting("begin_suppress_tokens") or ()),
    }


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
