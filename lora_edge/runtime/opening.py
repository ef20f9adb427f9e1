"""A bundle's parts in a session: its files checked, its driver chosen by the task.

Knows bundles; knows nothing of text or adapters' names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lora_edge.bundle.bundle import Bundle
from lora_edge.bundle.part import Part
from lora_edge.runtime.decoder import Decoder
from lora_edge.runtime.session import ModelSession
from lora_edge.tasks.task import Driver


def open_parts(bundle: Bundle, options: Mapping[str, Any], *, exact: bool = False) -> ModelSession:
    """The session of a bundle.

    Args:
        bundle: the bundle, whose files are checked as by :func:`checked_parts`.
        options: of :class:`~lora_edge.runtime.session.ModelSession`.
        exact: open the graphs that compute in floats, where the bundle's own do not.

    Raises:
        BundleError, ProviderError: as a session.
    """
    parts = checked_parts(bundle, exact=exact)
    return _driver(bundle.manifest.driver)(bundle.directory, parts, **options)


def checked_parts(bundle: Bundle, *, exact: bool = False) -> dict[str, Part]:
    """The parts of a bundle; graphs are checked against their hashes, their data by samples.

    Args:
        bundle: the bundle.
        exact: those that compute in floats, where the bundle's own do not.

    Raises:
        BundleError: a file is missing, cut off or damaged.
    """
    manifest = bundle.manifest
    parts = dict(manifest.parts)
    for name, part in manifest.parts.items():
        if exact:
            parts[name] = part.in_floats()
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
