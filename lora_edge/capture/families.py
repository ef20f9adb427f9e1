"""Which architectures the tracing backend refuses, by name, before it loads any weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_edge.errors import UnsupportedModelError

_EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ALIBI = frozenset({"bloom", "mpt"})
_OPTIMUM = "Capture it with --backend optimum, in an environment with lora-edge[optimum]."


def refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Refuse a model that tracing is known to get wrong.

    Args:
        config: the content of ``config.json``.

    Raises:
        UnsupportedModelError: the field, its value and the reason.
    """
    for field, value, reason, hint in _reasons(config):
        raise UnsupportedModelError(
            f"{config.get('model_type')} models are refused: {field} is {value!r}: {reason}", hint
        )


def _reasons(config: Mapping[str, Any]) -> Any:
    for field in _EXPERT_FIELDS:
        if (config.get(field) or 0) > 1:
            yield field, config[field], "mixture-of-experts routing depends on the data", _OPTIMUM
    if config.get("is_encoder_decoder"):
        yield "is_encoder_decoder", True, "only decoders are traced", _OPTIMUM
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        yield (
            "quantization_config",
            method,
            "a quantized checkpoint has no full-precision weights",
            "Give the full-precision base; a QLoRA adapter works on it too.",
        )
    if config.get("alibi") or config.get("model_type") in _ALIBI:
        yield "alibi", True, "ALiBi positions are not in the attention operator", _OPTIMUM
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = {rope.get("rope_type", rope.get("type"))}
    kinds |= {
        value.get("rope_type", value.get("type"))
        for value in rope.values()
        if isinstance(value, Mapping)
    }
    for kind in [kind for kind in ("longrope", "dynamic") if kind in kinds]:
        yield (
            "rope_type",
            kind,
            "its frequencies change with the length, and a trace keeps one branch only",
            _OPTIMUM,
        )
