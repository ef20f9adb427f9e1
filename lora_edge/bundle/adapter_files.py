"""An adapter's folder in a bundle: whether it fits, its tensors for the graph, PEFT's own files.

Knows adapters and bundles; knows nothing of graphs, captures or PyTorch.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from lora_edge.adapter.directory import (
    CONFIG_FILE,
    ORIGINAL_CONFIG_FILE,
    TENSOR_FILE,
    TRAINING_FILE,
)
from lora_edge.adapter.load import Adapter
from lora_edge.bundle.manifest import AdapterEntry
from lora_edge.bundle.onnx_adapter import write_adapter
from lora_edge.bundle.part import SiteEntry, StaticGraph
from lora_edge.errors import AdapterError
from lora_edge.fit.kinds import alone, kind_of
from lora_edge.maths.half import overflow
from lora_edge.maths.lora import FloatArray, Head, SiteChange, wider, zeros
from lora_edge.names import NONE_ADAPTER, SELECT, STACKED_PARTS, lora_input

Changes = Mapping[str, SiteChange]


def check_parts(adapter: Adapter, changes: Changes, layers: Mapping[str, SiteEntry]) -> None:
    """Check that a bundle's graph has the inputs that carry an adapter.

    Args:
        adapter: names it in the error.
        changes: what it changes.
        layers: module path -> layer of the base, with the inputs that it has, if any.

    Raises:
        AdapterError: it lacks one; the site and the kind are named.
    """
    for path, change in changes.items():
        missing = [part for part in change.parts() if part not in layers[path].parts]
        if missing:
            kinds = {kind_of(layers[path], part) for part in missing}
            raise AdapterError(
                f"adapter {adapter.name} needs {', '.join(sorted(kinds))} at {path}, and the "
                f"bundle's graph has no input {lora_input(path, missing[0])}",
                "Export again with this adapter (-a), or with --kinds "
                f"{','.join(sorted({'lora', *kinds}))}.",
            )


def largest_rank(given: Iterable[Changes]) -> int:
    """The largest rank of all pairs; 0 where there are none."""
    return max((change.rank for changes in given for change in changes.values()), default=0)


def check_rank(name: str, changes: Changes, static: StaticGraph) -> None:
    """Check that the graph with fixed shapes has room for an adapter.

    Raises:
        AdapterError: it has not; the layer and both ranks are named.
    """
    found = wider(changes, static.rank)
    if found is not None:
        raise AdapterError(
            f"adapter {name} has rank {found[1]} at {found[0]}, and the bundle's graph with fixed "
            f"shapes has room for {static.rank}",
            f"Export again with this adapter (-a) and --rank {largest_rank([changes])}.",
        )


def with_heads(changes: Changes, heads: Mapping[str, Head]) -> dict[str, SiteChange]:
    """What an adapter changes, and the base's task head where it brings none of its own."""
    found = dict(changes)
    for path, head in heads.items():
        change = found.get(path, SiteChange())
        found[path] = change if change.head is not None else change._replace(head=head)
    return found


def half_tensors(name: str, tensors: Mapping[str, FloatArray]) -> Mapping[str, FloatArray]:
    """The tensors of an adapter, if float16 can hold all of them.

    Raises:
        AdapterError: it cannot; the tensor and the number are named.
    """
    for key, tensor in tensors.items():
        largest = overflow(tensor)
        if largest:
            raise AdapterError(
                f"adapter {name} is refused: {key} holds {largest:.6g}, and float16 has no number "
                "above 65504",
                "Export with --precision fp32.",
            )
    return tensors


def write_none(
    stage: Path,
    sites: Mapping[str, SiteEntry],
    fingerprint: str,
    heads: Mapping[str, Head],
    *,
    half: bool = False,
) -> AdapterEntry:
    """Write the adapter that changes nothing: rank 1, zeros, at every site; the base's heads.

    ``half``: the graph is in float16, and so is a copy of the file.
    """
    changes = {
        path: SiteChange(zeros(site.in_features, site.out_features, 1))
        for path, site in sites.items()
        if "A" in site.parts
    }
    changes |= {path: SiteChange(head=head) for path, head in heads.items()}
    return _entry(
        stage, NONE_ADAPTER, "none", {}, "", fingerprint, changes, sites, proved=True, half=half
    )


def write_adapter_folder(
    directory: Path,
    adapter: Adapter,
    sites: Mapping[str, SiteEntry],
    changes: Changes | None,
    fingerprint: str,
    *,
    half: bool = False,
) -> AdapterEntry:
    """Write an adapter's folder; without ``changes`` (merged) only PEFT's own files.

    ``half`` as of :func:`write_none`.

    Raises:
        AdapterError: a tensor is not finite, or more than float16 holds where it is to.
    """
    folder = directory / "adapters" / adapter.name
    (folder / "peft").mkdir(parents=True)
    for name in (CONFIG_FILE, TENSOR_FILE, TRAINING_FILE, ORIGINAL_CONFIG_FILE):
        if (adapter.directory / name).is_file():
            shutil.copyfile(adapter.directory / name, folder / "peft" / name)
    return _entry(
        directory,
        adapter.name,
        adapter.kind,
        adapter.ranks(),
        adapter.digest,
        fingerprint,
        changes,
        sites,
        proved=False,
        alone=alone(adapter, sites),
        invocation=adapter.invocation,
        labels=adapter.labels,
        half=half,
    )


def graph_tensors(changes: Changes, sites: Mapping[str, SiteEntry]) -> dict[str, FloatArray]:
    """Every input of a graph for one adapter: what it changes, and zeros for the rest.

    ``lora.select`` and the gates are ones, so that the file alone switches the adapter on.
    """
    tensors: dict[str, FloatArray] = {}
    one = np.ones((1, 1, 1), np.float32)
    for path, site in sites.items():
        change = changes.get(path, SiteChange())
        if "A" in site.parts:
            # A convolution of no output channels is no convolution.
            nothing = zeros(site.in_features, site.out_features, int(site.kind == "conv"))
            pair = change.factors or nothing
            tensors[lora_input(path, "A")], tensors[lora_input(path, "B")] = pair.A, pair.B
            tensors[lora_input(path, "gate")] = one
        for part, vector in change.stacked().items():
            if part in site.parts:
                empty = np.zeros(site.out_features, np.float32)
                tensors[lora_input(path, part)] = (empty if vector is None else vector)[None]
        if change.head is not None:
            tensors[lora_input(path, "W")] = change.head.W[None]
            tensors[lora_input(path, "c")] = change.head.c[None, None]
    if any(set(site.parts) & set(STACKED_PARTS) for site in sites.values()):
        tensors[SELECT] = one
    return tensors


def finite_tensors(name: str, tensors: Mapping[str, FloatArray]) -> Mapping[str, FloatArray]:
    """The tensors of an adapter, if all are finite.

    Raises:
        AdapterError: one is not: what follows from the base's weights overflows float32.
    """
    for key, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise AdapterError(
                f"adapter {name} is refused: {key}, computed from its tensors and the base's, is "
                "NaN or Inf in float32",
                "The training diverged, or it is another base; use an earlier checkpoint.",
            )
    return tensors


def _entry(
    directory: Path,
    name: str,
    kind: str,
    ranks: Mapping[str, int],
    digest: str,
    fingerprint: str,
    changes: Changes | None,
    sites: Mapping[str, SiteEntry],
    *,
    proved: bool,
    alone: str = "",
    invocation: tuple[int, ...] = (),
    labels: tuple[str, ...] = (),
    half: bool = False,
) -> AdapterEntry:
    file = half_file = ""
    if changes is not None:
        file = f"adapters/{name}/adapter.onnx_adapter"
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        tensors = finite_tensors(name, graph_tensors(changes, sites))
        write_adapter(directory / file, tensors)
        if half:
            half_file = f"adapters/{name}/half.onnx_adapter"
            write_adapter(directory / half_file, half_tensors(name, tensors), half=True)
    return AdapterEntry(
        name=name,
        file=file,
        kind=kind,
        ranks=ranks,
        digest=digest,
        base_fingerprint=fingerprint,
        proved=proved,
        alone=alone,
        invocation=invocation,
        labels=labels,
        half=half_file,
    )
