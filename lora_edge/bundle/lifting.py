"""A manifest of format version 1 in the shape of version 2: its one graph's facts become parts.

Knows JSON; checks nothing: what is not as it has to be is refused when the result is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_edge.tasks.task import TASKS

_CACHE = ("layers", "kv_heads", "head_dim")
_BEGINNING = ("start", "open_language", "suppress", "begin_suppress")
# What has another name or place in version 2. Any other field goes along, and is refused there.
_MOVED = {
    "decoder": {"padding", "shared_cache", "max_length", "head", *_CACHE},
    "encoder": {"inputs", "output", "max_length", "image"},
    "encoder-decoder": {
        "encoder", "inputs", "max_source", "max_target", "features", *_BEGINNING
    },
}  # fmt: skip


def lift(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data of a manifest of version 1, as version 2 has it.

    Version 1 says of a decoder's inputs only what the runtime does not find in the graph.
    """
    found = {name: value for name, value in data.items() if name not in ("graph", "sites")}
    graph, sites, task = data.get("graph"), data.get("sites"), data.get("task")
    known = isinstance(task, str) and task in TASKS
    if not isinstance(graph, Mapping) or not isinstance(sites, Mapping) or not known:
        return {**found, "parts": graph}
    driver = TASKS[str(task)].driver
    own = {name: value for name, value in graph.items() if name not in _MOVED[driver]}
    found |= _LIFTED[driver](graph, own, sites)
    return {**found, "format_version": 2}


def _decoder(
    graph: Mapping[str, Any], own: Mapping[str, Any], sites: Mapping[str, Any]
) -> dict[str, Any]:
    cache = {name: graph.get(name) for name in _CACHE}
    part = {
        **own,
        "file": "onnx/model.onnx",
        "inputs": ["input_ids", "attention_mask"],
        "output": "logits",
        "max_length": graph.get("max_length"),
        "padding": graph.get("padding"),
        "head": graph.get("head", ""),
        "cache": {**cache, "kind": "shared" if graph.get("shared_cache") else "concatenated"},
        "sites": sites,
    }
    return {"parts": {"decoder": part}}


def _encoder(
    graph: Mapping[str, Any], own: Mapping[str, Any], sites: Mapping[str, Any]
) -> dict[str, Any]:
    part = {
        **own,
        "file": "onnx/model.onnx",
        "inputs": graph.get("inputs"),
        "output": graph.get("output"),
        "max_length": graph.get("max_length"),
        "sample": graph.get("image", []),
        "sites": sites,
    }
    return {"parts": {"encoder": part}}


def _both(
    graph: Mapping[str, Any], own: Mapping[str, Any], sites: Mapping[str, Any]
) -> dict[str, Any]:
    sample, below = graph.get("features", []), f"{graph.get('encoder')}."
    heard = {path: site for path, site in sites.items() if path.startswith(below)}
    encoder = {
        **own,
        "file": "onnx/encoder_model.onnx",
        "vocab_size": 0 if sample else graph.get("vocab_size"),
        "inputs": graph.get("inputs"),
        "output": "last_hidden_state",
        "max_length": graph.get("max_source"),
        "sample": sample,
        "sites": heard,
    }
    decoder = {
        **own,
        "file": "onnx/decoder_model.onnx",
        "inputs": ["input_ids", "encoder_hidden_states"],
        "output": "logits",
        "max_length": graph.get("max_target"),
        "sites": {path: site for path, site in sites.items() if path not in heard},
    }
    beginning = {name: graph[name] for name in _BEGINNING if name in graph}
    return {"parts": {"encoder": encoder, "decoder": decoder}, "beginning": beginning}


_LIFTED = {"decoder": _decoder, "encoder": _encoder, "encoder-decoder": _both}
