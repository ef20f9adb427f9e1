"""Execution providers: what was asked for is what runs, or an error says why not.

ONNX Runtime falls back to the CPU in silence, per session and per node. Here both are refused
unless the caller allows them, and the placement of every node can be asked for.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime as ort

from lora_edge.errors import BundleError, OptionError, ProviderError
from lora_edge.runtime import installed, plugins
from lora_edge.runtime.native_log import NativeLog, captured, release, without_status
from lora_edge.runtime.provider_hints import fallback_hint, start_hint
from lora_edge.runtime.provider_options import check_options, libraries
from lora_edge.targets.providers import PROVIDERS, unknown
from lora_edge.targets.providers import provider as known_provider
from lora_edge.targets.target import Target

if TYPE_CHECKING:
    from lora_edge.runtime.native.library import Native
    from lora_edge.runtime.prepared import PreparedGraphs

_CPU = "CPUExecutionProvider"
_DEVICE = "device"  # an option of ours: which of a plugin's devices

LEVELS = {
    "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
# Nodes that ONNX Runtime makes itself and that work on shapes: what takes a Transpose through a
# Shape picks its entries by a Gather. Of any other the file does not know what it reads.
_MADE = re.compile(r"Gather Gather(_token_\d+)?$|Shape |Size |Memcpy")
DATA_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class Provider:
    """An execution provider that this installation of ONNX Runtime has.

    Attributes:
        target: what is known of it; its names are there.
        options: the provider's own options, as ONNX Runtime takes them.
        devices: where it runs, of a provider from a package of its own.
    """

    target: Target
    options: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[Any, ...] = ()


def available() -> tuple[str, ...]:
    """Short names of the providers that this installation has, those of plugins included."""
    return tuple(each.name for each in _installed())


def _installed() -> tuple[Target, ...]:
    """The targets that this installation has a provider for: those of the table, then others."""
    names = {*ort.get_available_providers(), *plugins.packages()} - {"AzureExecutionProvider"}
    known = [each for each in PROVIDERS if each.ort_name in names]
    others = [unknown(name) for name in names if known_provider(name) is None]
    return (*known, *sorted(others, key=lambda each: each.name))


def resolve(name: str, options: Mapping[str, str] | None = None) -> Provider:
    """The provider of a short name or of ONNX Runtime's own name, with its options.

    Args:
        name: e.g. ``cuda`` or ``CUDAExecutionProvider``.
        options: the provider's own, e.g. ``{"device_id": "1"}``; ``device`` (cpu, gpu or npu)
            chooses among the devices of a provider from a package of its own.

    Raises:
        ProviderError: unknown, or not in this installation; the message lists those that are.
        OptionError: an option that the provider does not know.
    """
    found = known_provider(name) or _untabled(name)
    plugin = found.ort_name != _CPU and found.ort_name in plugins.packages()
    if not plugin and found.ort_name not in ort.get_available_providers():
        known = known_provider(name) is not None
        what = "is not in this installation of ONNX Runtime" if known else "is unknown"
        way = installed.way_to(found) or "the ONNX Runtime package that carries it"
        raise ProviderError(
            f"the execution provider {name!r} {what}; available: {', '.join(available())}",
            installed.conflict() or f"Choose one of these, or install it: {way}.",
        )
    given = {str(key): str(value) for key, value in (options or {}).items()}
    defaults = dict(found.defaults)
    if not plugin:
        check_options(found, given, libraries(found.ort_name))
        return Provider(found, {**defaults, **given})
    kind = given.pop(_DEVICE, None)
    check_options(found, given, [Path(plugins.library(found.ort_name))])
    devices = tuple(plugins.choose(found.ort_name, kind))
    defaults |= plugins.defaults(found.ort_name, kind, given)
    return Provider(found, {**defaults, **given}, devices)


def _untabled(name: str) -> Target:
    """The target of a name that is not in the table; one of this installation, if it has it."""
    wanted = name.lower()
    here = (x for x in _installed() if wanted in (x.name, x.ort_name.lower()))
    return next(here, unknown(name))


def open_session(
    graph: Path,
    provider: Provider,
    *,
    threads: int | None = None,
    optimization: str | None = None,
    allow_fallback: bool = False,
    weights: Mapping[str, Any] | None = None,
    prepared: PreparedGraphs | None = None,
    native: Native | None = None,
) -> Any:
    """An ``onnxruntime.InferenceSession`` on exactly this provider.

    Nodes that work on shapes and other integers may run on the CPU, which is where ONNX Runtime
    puts them by choice; a node that reads floats may not.

    Args:
        graph: the ONNX file; external data lies beside it.
        provider: from :func:`resolve`.
        threads: intra-op threads; None leaves it to ONNX Runtime (one per physical core).
        optimization: ``disable``, ``basic``, ``extended`` or ``all`` (None).
        allow_fallback: let the CPU run the nodes that the provider does not take.
        weights: initializer name -> OrtValue to use instead of its external data. They must live as
            long as the session, which reads them where they are.
        prepared: keeps the optimized graph, for the CPU and the whole of the optimizations.
        native: of a graph that is prepared: open its native form.

    Raises:
        ProviderError: the provider does not start, or leaves float work to the CPU.
        OptionError: an unknown level of optimization.
        BundleError: the graph cannot be loaded.
    """
    if optimization is not None and optimization not in LEVELS:
        raise OptionError(
            f"optimization is {optimization!r}, expected one of {', '.join(LEVELS)}",
            "Leave it out for all of ONNX Runtime's optimizations.",
        )
    level = optimization or "all"
    threads = threads or _allowed()
    if provider.target.ort_name == _CPU:

        def start(source: Path | bytes, settings: Mapping[str, str], saved: Path | None) -> Any:
            if isinstance(source, bytes):
                settings = {**settings, DATA_FOLDER: str(graph.parent)}
            options = session_options(level, threads, weights, settings)
            if saved is not None:
                options.optimized_model_filepath = str(saved)
            try:
                if native is not None:
                    options.register_custom_ops_library(str(native.library))
                model = source if isinstance(source, bytes) else str(source)
                return ort.InferenceSession(model, options, providers=[_CPU])
            except Exception as error:  # onnxruntime's exceptions share no base class of their own
                where = graph if isinstance(source, bytes) else source
                raise BundleError(
                    f"{where} cannot be loaded: {_first_line(error)}",
                    "Export it again." if native is None else native.hint,
                ) from error

        if prepared is None or weights or level != "all":
            return start(graph, {}, None)
        return prepared.open(graph, start, *([] if native is None else [native.form]))
    options = session_options(level, threads, weights, {})
    tells = hasattr(ort.InferenceSession, "get_provider_graph_assignment_info")
    if not allow_fallback and not tells:  # then no node at all may be left
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = _started(graph, provider, options)
    left = {} if allow_fallback or not tells else _left_to_cpu(session, graph)
    if left:
        count = sum(left.values())
        ran = sum((placement(session) or {}).get(provider.target.ort_name, {}).values())
        what = "node that computes" if count == 1 else "nodes that compute"
        named = ", ".join(f"{operator} ({n})" for operator, n in Counter(left).most_common(4))
        more = f" and {len(left) - 4} more" if len(left) > 4 else ""
        known = provider.target
        raise ProviderError(
            f"{known.ort_name} leaves {count} {what} with floats to the CPU: {named}{more}; "
            f"it runs {ran} nodes",
            fallback_hint(known),
        )
    return session


def session_options(
    level: str,
    threads: int | None,
    weights: Mapping[str, Any] | None,
    settings: Mapping[str, str],
) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = LEVELS[level]
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    if weights:
        # Not add_initializer, which takes effect after constants were folded: where a weight is
        # transposed first, the old one would be used without a word.
        options.add_external_initializers(list(weights), list(weights.values()))
    return options


def _allowed() -> int | None:
    """Processors that this process may use, where those are not all there are.

    ONNX Runtime would start a thread for each processor of the machine, and have them wait for each
    other in turns: on one of two, a step takes nearly twice the processor's time.
    """
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return None if found == os.cpu_count() else found


def _started(graph: Path, provider: Provider, options: Any) -> Any:
    """The session, on this provider; what its libraries say goes into the error, if there is one.

    Raises:
        ProviderError: it does not start.
    """
    name = provider.target.ort_name
    how: dict[str, Any] = {"enable_fallback": 0}  # which would try again on the CPU, and print
    if provider.devices:
        options.add_provider_for_devices(list(provider.devices), dict(provider.options))
    else:
        how["providers"] = [(name, dict(provider.options))]
    session, failure = None, None
    with captured() as log:
        try:
            session = ort.InferenceSession(str(graph), options, **how)
        except Exception as error:  # noqa: BLE001  # raised below, with what was written meanwhile
            failure = error
    if session is None:
        reason = _reason(log) or _first_line(failure)
        fallback = "fallback" in reason
        hint = fallback_hint(provider.target) if fallback else start_hint(log, provider.target)
        raise ProviderError(f"{name} cannot run {graph}: {reason}", hint) from failure
    if name not in session.get_providers():
        fallen = f"ONNX Runtime fell back to {', '.join(session.get_providers())}"
        raise ProviderError(
            f"{name} did not start: {_reason(log) or fallen}", start_hint(log, provider.target)
        )
    if log.errors():  # such as a backend that is not found: it then takes no node at all
        hint = start_hint(log, provider.target)
        raise ProviderError(f"{name} did not start: {_reason(log)}", hint)
    release(log)
    return session


def _reason(log: NativeLog) -> str:
    return next(iter(log.errors()), "")


def _left_to_cpu(session: Any, graph: Path) -> dict[str, int]:
    """Operator -> number of its nodes on the CPU that read floats."""
    nodes = [
        node
        for subgraph in session.get_provider_graph_assignment_info()
        if subgraph.ep_name == _CPU
        for node in subgraph.get_nodes()
    ]
    if not nodes:
        return {}
    from lora_edge.runtime.graph_types import float_work

    reads = float_work(graph)
    return dict(
        Counter(
            node.op_type
            for node in nodes
            if reads.get(node.name, _MADE.match(f"{node.op_type} {node.name}") is None)
        )
    )


def _first_line(error: BaseException | None) -> str:
    return without_status(next(iter(str(error).strip().splitlines()), type(error).__name__))


def open_like(session: Any, model: bytes, folder: Path) -> Any:
    """A session on another graph, with the provider and the options of a given one.

    Args:
        session: an ``onnxruntime.InferenceSession``.
        model: the serialized graph.
        folder: where its external data is: that of the session's own graph.
    """
    options = session.get_session_options()
    try:
        options.get_session_config_entry(DATA_FOLDER)
    except RuntimeError:  # it is not set yet; to set it twice is a warning
        options.add_session_config_entry(DATA_FOLDER, str(folder))
    has_devices = getattr(options, "has_providers", lambda: False)()
    if has_devices:  # a plugin's
        return ort.InferenceSession(model, options)
    given = session.get_provider_options()
    providers = [(name, given.get(name, {})) for name in session.get_providers()]
    return ort.InferenceSession(model, options, providers=providers)


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
