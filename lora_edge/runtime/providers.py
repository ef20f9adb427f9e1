"""Execution providers: what was asked for is what runs, or an error says why not.

ONNX Runtime falls back to the CPU in silence, per session and per node. Here both are refused
unless the caller allows them, and the placement of every node can be asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from lora_edge.errors import BundleError, ProviderError

# name -> (ONNX Runtime's name, memory its tensors live in, takes zero-size dimensions)
_KNOWN: Mapping[str, tuple[str, str, bool]] = {
    "cpu": ("CPUExecutionProvider", "cpu", True),
    "cuda": ("CUDAExecutionProvider", "cuda", False),
    "coreml": ("CoreMLExecutionProvider", "cpu", False),
    "directml": ("DmlExecutionProvider", "cpu", False),
    "migraphx": ("MIGraphXExecutionProvider", "cpu", False),
    "nnapi": ("NnapiExecutionProvider", "cpu", False),
    "openvino": ("OpenVINOExecutionProvider", "cpu", True),
    "qnn": ("QNNExecutionProvider", "cpu", False),
    "tensorrt": ("TensorrtExecutionProvider", "cuda", False),
    "webgpu": ("WebGpuExecutionProvider", "cpu", False),
    "xnnpack": ("XnnpackExecutionProvider", "cpu", False),
}

_LEVELS = {
    "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class Provider:
    """An execution provider that this installation of ONNX Runtime has.

    Attributes:
        name: short name, e.g. ``cpu``, ``cuda``.
        ort_name: ONNX Runtime's name.
        device: memory where tensors are placed, as ``OrtValue`` names it.
        zero_rank: it takes tensors with a zero-size dimension, so that "no adapter" costs nothing.
    """

    name: str
    ort_name: str
    device: str
    zero_rank: bool


def available() -> tuple[str, ...]:
    """Short names of the providers that this installation has."""
    installed = set(ort.get_available_providers())
    return tuple(name for name, (ort_name, _, _) in _KNOWN.items() if ort_name in installed)


def resolve(name: str) -> Provider:
    """The provider of a short name or of ONNX Runtime's own name.

    Raises:
        ProviderError: unknown, or not in this installation; the message lists those that are.
    """
    known = {**_KNOWN, **{entry[0]: entry for entry in _KNOWN.values()}}
    entry = known.get(name) or known.get(name.lower())
    if entry is None or entry[0] not in ort.get_available_providers():
        what = "is unknown" if entry is None else "is not in this installation of ONNX Runtime"
        raise ProviderError(
            f"the execution provider {name!r} {what}; available: {', '.join(available())}",
            "Choose one of these, or install the ONNX Runtime package that carries it.",
        )
    short = next(key for key, value in _KNOWN.items() if value is entry)
    return Provider(short, *entry)


def open_session(
    graph: Path,
    provider: Provider,
    *,
    threads: int | None = None,
    optimization: str | None = None,
    allow_fallback: bool = False,
    weights: Mapping[str, Any] | None = None,
) -> Any:
    """An ``onnxruntime.InferenceSession`` on exactly this provider.

    Args:
        graph: the ONNX file; external data lies beside it.
        provider: from :func:`resolve`.
        threads: intra-op threads; None leaves it to ONNX Runtime (one per physical core).
        optimization: ``disable``, ``basic``, ``extended`` or ``all`` (None).
        allow_fallback: let the CPU run the nodes that the provider does not take.
        weights: initializer name -> OrtValue to use instead of its external data. They must live as
            long as the session, which reads them where they are.

    Raises:
        ProviderError: the provider does not start, or leaves nodes to the CPU.
        BundleError: the graph cannot be loaded.
    """
    if optimization is not None and optimization not in _LEVELS:
        raise ProviderError(
            f"optimization is {optimization!r}, expected one of {', '.join(_LEVELS)}",
            "Leave it out for all of ONNX Runtime's optimizations.",
        )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = _LEVELS[optimization or "all"]
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if weights:
        # Not add_initializer, which takes effect after constants were folded: where a weight is
        # transposed first, the old one would be used without a word.
        options.add_external_initializers(list(weights), list(weights.values()))
    strict = provider.name != "cpu" and not allow_fallback
    if strict:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = ort.InferenceSession(str(graph), options, providers=[provider.ort_name])
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        reason = str(error).strip().splitlines()[0]
        if strict:
            raise ProviderError(
                f"{provider.ort_name} cannot run {graph} alone: {reason}",
                "Pass allow_fallback=True to let the CPU run what it leaves.",
            ) from error
        raise BundleError(f"{graph} cannot be loaded: {reason}", "Export it again.") from error
    if session.get_providers()[0] != provider.ort_name:
        raise ProviderError(
            f"{provider.ort_name} did not start; ONNX Runtime fell back to "
            f"{', '.join(session.get_providers())}",
            "Check its driver and libraries, or choose provider='cpu'.",
        )
    return session


def open_like(session: Any, model: bytes, folder: Path) -> Any:
    """A session on another graph, with the provider and the options of a given one.

    Args:
        session: an ``onnxruntime.InferenceSession``.
        model: the serialized graph.
        folder: where its external data is: that of the session's own graph.
    """
    options = session.get_session_options()
    try:
        options.get_session_config_entry(_DATA_FOLDER)
    except RuntimeError:  # it is not set yet; to set it twice is a warning
        options.add_session_config_entry(_DATA_FOLDER, str(folder))
    return ort.InferenceSession(model, options, providers=session.get_providers())


def placement(session: Any) -> dict[str, dict[str, int]] | None:
    """Which provider runs which operators: provider name -> operator -> number of nodes.

    None where this release of ONNX Runtime does not tell.
    """
    info = getattr(session, "get_provider_graph_assignment_info", None)
    if info is None:
        return None
    placed: dict[str, dict[str, int]] = {}
    for subgraph in info():
        counts = placed.setdefault(subgraph.ep_name, {})
        for node in subgraph.get_nodes():
            operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            counts[operator] = counts.get(operator, 0) + 1
    return placed
