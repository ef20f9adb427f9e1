"""The naming contract: PEFT key <-> module path <-> graph input.

A *module path* is the dotted path of a module in the base model as transformers builds it
(``model.layers.0.self_attn.q_proj``). It is the only identity of a site: the graph's inputs, the
``.onnx_adapter`` files, the manifest and the reports all use it. A *parameter path* is a module
path and the parameter's own name (``model.norm.weight``). This module makes and parses every such
name; nothing else may.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast, get_args

InputPart = Literal["A", "B", "gate", "G", "bias", "weight", "W", "c"]
"""A site's graph inputs; what each is for is said in :mod:`lora_edge.graph.branch`."""

TextAspect = Literal["tokenizer", "chat_template"]
"""What an adapter's folder may bring that has to do with text."""

FACTOR_PARTS: tuple[InputPart, ...] = ("A", "B", "gate")
"""What every low-rank site has."""

STACKED_PARTS: tuple[InputPart, ...] = ("G", "bias", "weight")
"""What is stacked over the resident adapters, ``[S, size]``, and read through :data:`SELECT`."""

SELECT = "lora.select"
"""Graph input ``[batch | 1, seq | 1, S]``: the weight of each of the S resident adapters."""

PeftPart = Literal[
    "A", "B", "B.bias", "magnitude", "embedding_A", "embedding_B", "tokens", "base", "saved",
    "idle", "training",
]  # fmt: skip
"""What a tensor of a PEFT file is; ``base`` is a copy of a weight of the base, ``saved`` a whole
parameter that replaces the base's, ``idle`` one of a module that is itself replaced, ``training``
what only training reads."""

_INPUT = re.compile(rf"lora\.(?P<path>.+)\.(?P<part>{'|'.join(get_args(InputPart))})")
PEFT_PREFIX = "base_model.model."
"""What every key of a PEFT file begins with."""
_PEFT_KEYS: tuple[tuple[PeftPart, re.Pattern[str]], ...] = (
    ("A", re.compile(r"(.+)\.lora_A\.weight")),
    ("B", re.compile(r"(.+)\.lora_B\.weight")),
    ("B.bias", re.compile(r"(.+)\.lora_B\.bias")),
    ("magnitude", re.compile(r"(.+)\.lora_magnitude_vector(?:\.weight)?")),
    ("embedding_A", re.compile(r"(.+)\.lora_embedding_A")),
    ("embedding_B", re.compile(r"(.+)\.lora_embedding_B")),
    ("tokens", re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta")),
    # VeLoRA's projection and MonteCLoRA's sampler; both are plain LoRA at inference (variants.py).
    ("training", re.compile(r"(.+\.lora_(?:velora_embed|monteclora_sampler\.[^.]+))")),
    ("base", re.compile(r"(.+)\.base_layer\.weight")),
)
# The adapter name that PEFT loads under unless told otherwise: keys that hold it are loaded too.
_DEFAULT_NAME = re.compile(r"(\.lora_[A-Za-z_]+)\.default(?=\.|$)")
_SAVED_COPY = re.compile(
    r"(?P<module>.+)\.(?P<copy>modules_to_save(?:\.[^.]+(?=\..+\.))?|original_module)"
    r"(?P<below>(?:\.[^.]+)*)\.(?P<own>weight|bias)"
)
BASE_LAYER = ".base_layer."
"""In the key of a parameter of the layer that PEFT has put a wrapper around."""


NONE_ADAPTER = "none"
"""The adapter that ships in every switchable bundle and changes nothing (rank 1, zeros)."""

NUM_LOGITS_TO_KEEP = "num_logits_to_keep"
"""Optional graph input, int64 ``[]``: how many last tokens of each row get logits; 0: all columns.
onnxruntime-genai and transformers.js fill it by themselves."""
LOGITS_POSITIONS = "logits_positions"
"""In its place in bundles of earlier releases, int64 ``[batch, kept]``: the very positions."""


class GraphInput(NamedTuple):
    """A parsed graph input name: which site it belongs to, and which of its tensors it is."""

    path: str
    part: InputPart


class PeftKey(NamedTuple):
    """A parsed key of a PEFT file: a module path (``saved``: a parameter path), and what it is."""

    path: str
    part: PeftPart


def lora_input(path: str, part: InputPart) -> str:
    """Name of a site's graph input, ``lora.<module path>.<part>``."""
    return f"lora.{path}.{part}"


def parse_lora_input(name: str) -> GraphInput | None:
    """Parse a site's graph input name; ``None`` when it is none (:data:`SELECT` is none)."""
    match = _INPUT.fullmatch(name)
    return None if match is None else GraphInput(match["path"], cast(InputPart, match["part"]))


def packed_name(paths: Sequence[str]) -> str:
    """Name of a node that has several layers, and of its weight: their module paths."""
    return "+".join(paths)


def packed_paths(name: str) -> list[str]:
    """The module paths of a node's layers; one, unless it is packed."""
    return name.split("+")


def canonical_peft_key(key: str) -> str:
    """The key of a PEFT tensor without the adapter name ``default``."""
    return _DEFAULT_NAME.sub(r"\1", key)


def parse_peft_key(key: str) -> PeftKey | None:
    """Split the key of a PEFT tensor; ``None`` when it is of no kind that is known here."""
    name = canonical_peft_key(key).removeprefix(PEFT_PREFIX)
    for part, pattern in _PEFT_KEYS:
        match = pattern.fullmatch(name)
        if match is not None:
            return PeftKey(match[1], part)
    # With bias="all" PEFT saves the biases of a replaced module under its wrapper's names too, and
    # of modules below it with the adapter's name.
    copy = _SAVED_COPY.fullmatch(name)
    if copy is not None:
        part = "idle" if copy["copy"] == "original_module" else "saved"
        return PeftKey(f"{copy['module']}{copy['below']}.{copy['own']}", part)
    if re.search(r"(^|\.)(lora_|original_module|modules_to_save|token_adapter)", name):
        return None
    # A trained bias of an adapted layer is saved below the wrapper that PEFT put around the layer.
    return PeftKey(name.replace(BASE_LAYER, "."), "saved") if "." in name else None


def past_name(layer: int, part: Literal["key", "value"]) -> str:
    """Name of a KV cache input, ``past_key_values.<layer>.<key|value>``."""
    return f"past_key_values.{layer}.{part}"


ENCODER_STATES, ENCODER_MASK = "encoder_hidden_states", "encoder_attention_mask"
"""What a decoder reads of an encoder."""


def is_past(name: str) -> bool:
    """Whether a graph input is of the KV cache."""
    return name.startswith("past_key_values.")


def present_name(layer: int, part: Literal["key", "value"]) -> str:
    """Name of a KV cache output, ``present.<layer>.<key|value>``."""
    return f"present.{layer}.{part}"
