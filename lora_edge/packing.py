"""An adapter's folder in a bundle: whether it fits, its tensors for the graph, PEFT's own files.

Knows adapters and bundles; knows nothing of graphs, captures or PyTorch.
"""

from __future__ import annotations

import difflib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_edge.adapter import CONFIG_FILE, TENSOR_FILE, TRAINING_FILE, Adapter
from lora_edge.bundle import AdapterEntry, SiteEntry
from lora_edge.errors import AdapterError, UnsupportedAdapterError
from lora_edge.lora import FloatArray, zeros
from lora_edge.names import NONE_ADAPTER, lora_input
from lora_edge.refusals import MERGE_FIRST
from lora_edge.runtime.adapter_file import write_adapter

_ONE_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")


def check_base_of(adapter: Adapter, fingerprint: str, name: str) -> None:
    """Check that an adapter was trained on this base, where its trainer recorded on which.

    Raises:
        AdapterError: it was another base; both fingerprints are named.
    """
    if adapter.base_fingerprint is not None and adapter.base_fingerprint != fingerprint:
        raise AdapterError(
            f"adapter {adapter.name} was trained on a base with fingerprint "
            f"{adapter.base_fingerprint[:12]}, {name} has {fingerprint[:12]}",
            f"Export it with its own base: {adapter.base_model}",
        )


def check_sites(adapter: Adapter, sites: Mapping[str, SiteEntry], where: str) -> None:
    """Check that every layer that an adapter changes is there, in the adapter's shape.

    Raises:
        AdapterError: a layer is missing (near misses are named), or has another shape.
        UnsupportedAdapterError: it is a layer of one expert of a mixture.
    """
    for path, module in adapter.modules.items():
        site = sites.get(path)
        if site is None:
            if _ONE_EXPERT.search(path):
                raise UnsupportedAdapterError(
                    f"adapter {adapter.name} changes {path}, a linear layer of one expert, which "
                    "sees only the tokens that were sent to it; transformers 5 has no such layers, "
                    f"and {where} keeps all experts in one parameter",
                    MERGE_FIRST,
                )
            near = difflib.get_close_matches(path, sites, n=3)
            raise AdapterError(
                f"adapter {adapter.name} changes {path}, and {where} has no such site"
                + (f"; near misses: {', '.join(near)}" if near else ""),
                "If the layer exists in the base, export again with this adapter (-a), so that the "
                "graph gets a branch there; else the adapter is for another base.",
            )
        if (site.in_features, site.out_features) != (module.in_features, module.out_features):
            raise AdapterError(
                f"adapter {adapter.name}: {path} is [{module.in_features} -> "
                f"{module.out_features}], {where} has [{site.in_features} -> {site.out_features}]",
                f"The adapter is for another base: {adapter.base_model}",
            )


def write_none(stage: Path, sites: Mapping[str, SiteEntry], fingerprint: str) -> AdapterEntry:
    """Write the adapter that changes nothing: rank 1, zeros, at every site."""
    tensors: dict[str, FloatArray] = {}
    for path, site in sites.items():
        pair = zeros(site.in_features, site.out_features, 1)
        tensors |= _tensors(path, pair.A, pair.B)
    return _entry(stage, NONE_ADAPTER, "none", {}, "", fingerprint, tensors, proved=True)


def write_adapter_folder(
    directory: Path, adapter: Adapter, sites: Mapping[str, SiteEntry] | None, fingerprint: str
) -> AdapterEntry:
    """Write an adapter's folder; without ``sites`` (merged) only PEFT's own files."""
    folder = directory / "adapters" / adapter.name
    (folder / "peft").mkdir(parents=True)
    for name in (CONFIG_FILE, TENSOR_FILE, TRAINING_FILE):
        if (adapter.directory / name).is_file():
            shutil.copyfile(adapter.directory / name, folder / "peft" / name)
    tensors: dict[str, FloatArray] | None = None
    if sites is not None:
        tensors = {}
        for path, site in sites.items():
            module = adapter.modules.get(path)
            pair = module.factors() if module else zeros(site.in_features, site.out_features, 0)
            tensors |= _tensors(path, pair.A, pair.B)
    return _entry(
        directory,
        adapter.name,
        adapter.kind,
        adapter.ranks(),
        adapter.digest,
        fingerprint,
        tensors,
        proved=False,
    )


def _tensors(path: str, a: FloatArray, b: FloatArray) -> dict[str, FloatArray]:
    gate: NDArray[np.float32] = np.ones((1, 1, 1), np.float32)
    return {lora_input(path, "A"): a, lora_input(path, "B"): b, lora_input(path, "gate"): gate}


def _entry(
    directory: Path,
    name: str,
    kind: str,
    ranks: Mapping[str, int],
    digest: str,
    fingerprint: str,
    tensors: dict[str, FloatArray] | None,
    *,
    proved: bool,
) -> AdapterEntry:
    file = ""
    if tensors is not None:
        file = f"adapters/{name}/adapter.onnx_adapter"
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        write_adapter(directory / file, tensors)
    return AdapterEntry(
        name=name,
        file=file,
        kind=kind,
        ranks=ranks,
        digest=digest,
        base_fingerprint=fingerprint,
        proved=proved,
    )
