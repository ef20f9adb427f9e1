"""Adapters' files against the PEFT files behind them, folded anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_edge.bundle.adapter_files import graph_tensors, with_heads
from lora_edge.bundle.bundle import Bundle
from lora_edge.bundle.onnx_adapter import read_adapter, read_half
from lora_edge.bundle.part import SiteEntry
from lora_edge.fit.changes import site_changes
from lora_edge.maths.lora import Head
from lora_edge.maths.quantization import rounded_weights
from lora_edge.names import NONE_ADAPTER
from lora_edge.parity.carried import carried_adapter

_SAME = 1e-5  # of a tensor's largest value
_NAMED = 3

Weights = Callable[[str], "NDArray[np.floating] | None"]


def compare_tensors(bundle: Bundle, name: str, directory: Path, weights: Weights) -> str:
    """What the file of an adapter holds otherwise than its PEFT files give; empty: nothing.

    Args:
        bundle: a switchable one.
        name: the adapter.
        directory: its PEFT directory.
        weights: the base's parameters; ``None`` where it has none.
    """
    manifest = bundle.manifest
    layers: Mapping[str, SiteEntry] = {**manifest.uncovered, **manifest.sites}
    rounded = rounded_weights(weights, manifest.quantization, layers)
    adapter = carried_adapter(bundle, name, directory).settled(layers)
    changes = site_changes(adapter, layers, rounded, manifest.tied)
    wanted = graph_tensors(with_heads(changes, _base_heads(bundle, weights)), manifest.sites)
    own = read_adapter(bundle.directory / bundle.adapter(name).file)
    odd = [key for key in sorted(wanted.keys() | own.keys()) if _differ(own, wanted, key)]
    if not odd:
        half = bundle.adapter(name).half
        return _copy_differs(half, own, read_half(bundle.directory / half)) if half else ""
    more = f" and {len(odd) - _NAMED} more" if len(odd) > _NAMED else ""
    return (
        f"the file of {name} differs from what its PEFT files give in {len(odd)} of {len(wanted)} "
        f"tensors: {', '.join(odd[:_NAMED])}{more}"
    )


def _copy_differs(
    file: str, own: Mapping[str, NDArray[np.floating]], copy: Mapping[str, NDArray[np.float16]]
) -> str:
    """What a copy in float16 holds otherwise; empty: nothing."""
    odd = sorted(own.keys() ^ copy.keys()) or [
        key for key in sorted(own) if not np.array_equal(own[key].astype(np.float16), copy[key])
    ]
    return f"{file} is no copy in float16: {odd[0]} differs" if odd else ""


def _base_heads(bundle: Bundle, weights: Weights) -> dict[str, Head]:
    """The base's own task heads, which adapters without one of their own have."""
    none = bundle.manifest.adapters.get(NONE_ADAPTER)
    heads = {}
    if none is not None and none.labels:
        for path, site in bundle.manifest.sites.items():
            weight, bias = weights(f"{path}.weight"), weights(f"{path}.bias")
            if "W" in site.parts and weight is not None:
                heads[path] = Head(
                    np.ascontiguousarray(weight.T, np.float32),
                    np.zeros(len(weight), np.float32) if bias is None else bias.astype(np.float32),
                )
    return heads


def _differ(
    own: Mapping[str, NDArray[np.floating]], wanted: Mapping[str, NDArray[np.floating]], key: str
) -> bool:
    one, other = own.get(key), wanted.get(key)
    if one is None or other is None or one.shape != other.shape:
        return True
    if not one.size:
        return False
    apart = np.abs(one - other).max()
    return not apart <= _SAME * np.abs(other).max()
