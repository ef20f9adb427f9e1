"""Changes of an adapter's tensors, each of which undoes a mistake.

Where an adapter that is wrong is right with one of them, the mistake is known. Knows the graph's
input names and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

import numpy as np

from lora_edge.maths.lora import FloatArray
from lora_edge.names import lora_input, parse_lora_input

Tensors = Mapping[str, FloatArray]
"""Graph input name -> array."""

Pair = tuple[FloatArray, FloatArray]
"""A ``[in, R]`` and B ``[R, out]`` of a site."""

_ROLLS = 8
_LAYERS = 32


def repairs(own: Tensors) -> Iterator[tuple[str, dict[str, FloatArray]]]:
    """What is wrong if an adapter is right with these tensors, and the tensors."""
    sites = _sites(own)
    if len({a.shape[1] for a, _ in sites.values()}) == 1:
        edits = {k: v for k, v in _EDITS.items() if v not in (_rooted, _unrooted)}
    else:  # with one rank for all, it is a factor like any other
        edits = dict(_EDITS)
    for clause, edit in edits.items():
        changed = {path: edit(*pair) for path, pair in sites.items()}
        if any(pair is not None for pair in changed.values()):
            yield clause, _replaced(own, {path: pair for path, pair in changed.items() if pair})
    for shift in range(1, min(max((a.shape[1] for a, _ in sites.values()), default=0), _ROLLS)):
        rolled = {path: (a, np.roll(b, shift, 0)) for path, (a, b) in sites.items()}
        yield "the ranks of B are shifted against those of A", _replaced(own, rolled)
    for one, other in _leaf_pairs(sites):
        pairs = {f"{parent}{one}": f"{parent}{other}" for parent in _parents(sites, one)}
        if exchanged := _exchanged(own, pairs):
            yield f"{one} and {other} are exchanged", exchanged
    yield from _layers(own, sites)


def _rooted(a: FloatArray, b: FloatArray) -> Pair | None:
    return a, b * np.float32(a.shape[1] ** 0.5)


def _unrooted(a: FloatArray, b: FloatArray) -> Pair | None:
    return a, b / np.float32(a.shape[1] ** 0.5)


def _swapped(a: FloatArray, b: FloatArray) -> Pair | None:
    return (b.T, a.T) if a.shape == b.T.shape else None


def _a_as_read(a: FloatArray, b: FloatArray) -> Pair | None:
    return a.reshape(a.shape[::-1]).T, b


def _b_as_read(a: FloatArray, b: FloatArray) -> Pair | None:
    return a, b.reshape(b.shape[::-1]).T


def _both_as_read(a: FloatArray, b: FloatArray) -> Pair | None:
    return a.reshape(a.shape[::-1]).T, b.reshape(b.shape[::-1]).T


def _reversed(a: FloatArray, b: FloatArray) -> Pair | None:
    return a, b[::-1]


_EDITS: Mapping[str, Callable[[FloatArray, FloatArray], Pair | None]] = {
    "scaled by alpha / r where rsLoRA's alpha / sqrt(r) is right": _rooted,
    "scaled by rsLoRA's alpha / sqrt(r) where alpha / r is right": _unrooted,
    "A and B are swapped": _swapped,
    "A was not transposed": _a_as_read,
    "B was not transposed": _b_as_read,
    "A and B were not transposed": _both_as_read,
    "the ranks of B are in reverse order against those of A": _reversed,
}


def _sites(own: Tensors) -> dict[str, Pair]:
    """Module path -> A and B, where they do something."""
    found: dict[str, Pair] = {}
    for key in own:
        parsed = parse_lora_input(key)
        if parsed is not None and parsed.part == "B" and own[key].any():
            found[parsed.path] = own[lora_input(parsed.path, "A")], own[key]
    return found


def _replaced(own: Tensors, pairs: Mapping[str, Pair]) -> dict[str, FloatArray]:
    tensors = dict(own)
    for path, (a, b) in pairs.items():
        tensors[lora_input(path, "A")] = np.ascontiguousarray(a)
        tensors[lora_input(path, "B")] = np.ascontiguousarray(b)
    return tensors


def _leaf_pairs(sites: Mapping[str, Pair]) -> list[tuple[str, str]]:
    """Names of layers that stand side by side, two by two."""
    beside: dict[str, list[str]] = {}
    for path in sites:
        parent, dot, leaf = path.rpartition(".")
        beside.setdefault(parent + dot, []).append(leaf)
    found = {(a, b): None for leaves in beside.values() for a in leaves for b in leaves if a < b}
    return list(found)


def _parents(sites: Mapping[str, Pair], leaf: str) -> list[str]:
    return [path[: -len(leaf)] for path in sites if path.rpartition(".")[2] == leaf]


def _exchanged(own: Tensors, places: Mapping[str, str]) -> dict[str, FloatArray] | None:
    """The tensors with those of paths exchanged; None if their shapes do not allow it."""
    tensors = dict(own)
    for one, other in places.items():
        for key in own:
            parsed = parse_lora_input(key)
            if parsed is None or parsed.path != one or parsed.part == "gate":
                continue
            twin = lora_input(other, parsed.part)
            at = {"A": 0, "B": 1}.get(parsed.part)
            fits = twin in own and (
                own[twin].shape == own[key].shape
                if at is None
                else own[twin].shape[at] == own[key].shape[at]
            )
            if not fits:
                return None
            tensors[key], tensors[twin] = own[twin], own[key]
    return tensors


_NUMBER = re.compile(r"\.(\d+)\.")


def _layers(own: Tensors, sites: Mapping[str, Pair]) -> Iterator[tuple[str, dict[str, FloatArray]]]:
    """Neighbouring layers exchanged, two by two."""
    numbers = sorted({int(found.group(1)) for path in sites if (found := _NUMBER.search(path))})
    for one, other in list(pairwise(numbers))[:_LAYERS]:
        places = {
            path: _NUMBER.sub(f".{other}.", path, count=1)
            for path in sites
            if (found := _NUMBER.search(path)) and int(found.group(1)) == one
        }
        if exchanged := _exchanged(own, places):
            yield f"the factors of layers {one} and {other} are exchanged", exchanged
