"""A bundle's parts in a session: its files checked, its driver chosen by the task.

Knows bundles; knows nothing of text or adapters' names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lora_edge.bundle.bundle import Bundle
from lora_edge.bundle.part import Part
from lora_edge.errors import BundleError
from lora_edge.runtime.decoder import Decoder
from lora_edge.runtime.session import ModelSession
from lora_edge.targets.providers import provider as known_provider
from lora_edge.tasks.task import Driver


def runs_static(bundle: Bundle, provider: str, static: bool | None) -> bool:
    """Whether a bundle's graph with fixed shapes is the one to run.

    Args:
        bundle: the bundle.
        provider: name of the execution provider.
        static: what was asked for; None: where the provider takes fixed shapes only, and there is
            such a graph.

    Raises:
        BundleError: it was asked for, and there is none.
    """
    has = any(part.static is not None for part in bundle.manifest.parts.values())
    if static is None:
        known = known_provider(provider)
        return has and known is not None and known.dynamic_shapes is False
    if static and not has:
        raise BundleError(
            f"{bundle.directory} has no graph with fixed shapes",
            "Export it with --static, or run it without.",
        )
    return static


def open_parts(
    bundle: Bundle, options: Mapping[str, Any], *, exact: bool = False, static: bool = False
) -> ModelSession:
    """The session of a bundle.

    Args:
        bundle: the bundle, whose files are checked as by :func:`checked_parts`.
        options: of :class:`~lora_edge.runtime.session.ModelSession`.
        exact: open the graphs that compute in floats, where the bundle's own do not.
        static: open the graph with fixed shapes.

    Raises:
        BundleError, ProviderError: as a session.
    """
    parts = checked_parts(bundle, exact=exact, static=static)
    return _driver(bundle.manifest.driver)(bundle.directory, parts, **options)


def checked_parts(bundle: Bundle, *, exact: bool = False, static: bool = False) -> dict[str, Part]:
    """The parts of a bundle; graphs are checked against their hashes, their data by samples.

    Args:
        bundle: the bundle.
        exact: those that compute in floats, where the bundle's own do not.
        static: those with fixed shapes.

    Raises:
        BundleError: a file is missing, cut off or damaged.
    """
    manifest = bundle.manifest
    parts = dict(manifest.parts)
    for name, part in manifest.parts.items():
        if exact:
            parts[name] = part.in_floats()
        if static:
            parts[name] = part.in_fixed_shapes()
        bundle.verify(parts[name].file)
        data = f"{part.file}_data"
        if data in manifest.files:  # small graphs carry their weights inside
            bundle.verify_sample(data)
    return parts


def _driver(name: Driver) -> Callable[..., ModelSession]:
    if name == "decoder":
        return Decoder
    # Imported when needed: most bundles generate text.
    from lora_edge.runtime.encoder import Encoder
    from lora_edge.runtime.seq2seq import Seq2Seq

    return Encoder if name == "encoder" else Seq2Seq
