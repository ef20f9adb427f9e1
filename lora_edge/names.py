"""The naming contract: PEFT key <-> module path <-> graph input.

A *module path* is the dotted path of a module in the base model as transformers builds it
(``model.layers.0.self_attn.q_proj``). It is the only identity of a site: the graph's inputs, the
``.onnx_adapter`` files, the manifest and the reports all use it. This module makes and parses every
such name; nothing else may.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Part = Literal["A", "B", "gate"]
PARTS: tuple[Part, ...] = ("A", "B", "gate")

_INPUT = re.compile(r"lora\.(?P<path>.+)\.(?P<part>A|B|gate)")
_PEFT_PREFIX = "base_model.model."
_PEFT_KEY = re.compile(r"(?P<path>.+)\.(?P<part>lora_A|lora_B)\.weight")

NONE_ADAPTER = "none"
"""The adapter that ships in every switchable bundle and changes nothing (rank 1, zeros)."""

LOGITS_POSITIONS = "logits_positions"
"""Optional graph input, int64 ``[batch, kept]``: the positions whose logits are computed."""


class GraphInput(NamedTuple):
    """A parsed graph input name: which site it belongs to, and which of its three tensors it is."""

    path: str
    part: Part


def lora_input(path: str, part: Part) -> str:
    """Name of a site's graph input, ``lora.<module path>.<A|B|gate>``."""
    return f"lora.{path}.{part}"


def parse_lora_input(name: str) -> GraphInput | None:
    """Parse a graph input name; ``None`` when it is not an adapter input."""
    match = _INPUT.fullmatch(name)
    if match is None:
        return None
    part = match["part"]
    return GraphInput(match["path"], "A" if part == "A" else "B" if part == "B" else "gate")


def parse_peft_key(key: str) -> tuple[str, Literal["A", "B"]] | None:
    """Split a PEFT tensor key into ``(module path, "A" | "B")``.

    ``None`` when the key is not a plain LoRA factor (``….lora_A.weight``, ``….lora_B.weight``).
    """
    match = _PEFT_KEY.fullmatch(key)
    if match is None:
        return None
    path = match["path"].removeprefix(_PEFT_PREFIX)
    return path, ("A" if match["part"] == "lora_A" else "B")


def past_name(layer: int, part: Literal["key", "value"]) -> str:
    """Name of a KV cache input, ``past_key_values.<layer>.<key|value>``."""
    return f"past_key_values.{layer}.{part}"


def present_name(layer: int, part: Literal["key", "value"]) -> str:
    """Name of a KV cache output, ``present.<layer>.<key|value>``."""
    return f"present.{layer}.{part}"
