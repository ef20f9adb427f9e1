"""The kinds of adapters that a graph can have inputs for, and which inputs those are.

Knows layers and their inputs; knows nothing of weights or graphs.
"""

from __future__ import annotations

from collections.abc import Mapping

from lora_edge.adapter.load import Adapter
from lora_edge.base.layer import Layer
from lora_edge.names import FACTOR_PARTS, InputPart

_KIND_OF_PART: dict[InputPart, str] = {
    "A": "lora", "B": "lora", "gate": "lora", "G": "dora", "bias": "bias", "weight": "norm",
    "W": "head", "c": "head",
}  # fmt: skip

KINDS = ("lora", "dora", "bias", "norm", "embedding", "conv", "head")
"""What ``export --kinds`` takes."""


def kind_of(entry: Layer, part: InputPart) -> str:
    """Which of :data:`KINDS` an input of a site belongs to."""
    if part in FACTOR_PARTS and entry.kind in ("embedding", "conv"):
        return entry.kind
    return _KIND_OF_PART[part]


def parts_of_kinds(entry: Layer, kinds: tuple[str, ...]) -> tuple[InputPart, ...]:
    """The inputs that a site gets when a graph is exported for some kinds, whoever needs them."""
    possible: dict[str, tuple[InputPart, ...]] = {
        "linear": (*FACTOR_PARTS, "G", "bias"),
        "embedding": (*FACTOR_PARTS, "G"),
        "conv": (*FACTOR_PARTS, "G", "bias"),
        "norm": ("weight", "bias") if entry.bias else ("weight",),
        "head": ("W", "c"),
    }
    wanted = (entry.kind, "dora") if entry.kind in ("embedding", "conv") else ("dora",)
    return tuple(
        part
        for part in possible[entry.kind]
        if (set(wanted) <= set(kinds) if part == "G" else kind_of(entry, part) in kinds)
    )


def alone(adapter: Adapter, modules: Mapping[str, Layer]) -> str:
    """Why an adapter can be neither blended nor weighted; empty where it can."""
    if any(module.magnitude is not None for module in adapter.modules.values()):
        return "DoRA rescales the base by norms that belong to its own weight 1"
    if adapter.invocation:
        return "an activated LoRA works on its own tokens only"
    heads = [path for path, entry in modules.items() if entry.kind == "head"]
    owners = {path.rpartition(".")[0] for path in adapter.saved}
    if not {*owners, *adapter.modules}.isdisjoint(heads):
        return "its task head replaces the base's"
    return ""
