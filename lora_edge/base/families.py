"""Which architectures the tracing backend refuses, by name, before it loads any weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from lora_edge.errors import UnsupportedModelError
from lora_edge.tasks.task import TEXT, Task

_EXPERT_FIELDS = (
    "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts",
)  # fmt: skip
_ALIBI = frozenset({"bloom", "mpt"})
_RECURRENT = frozenset(
    {
        "bamba", "falcon_h1", "falcon_mamba", "jamba", "mamba", "mamba2", "nemotron_h",
        "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2",
    }
)  # fmt: skip
# The rotary kinds whose frequencies are the same at every length.
_STATIC_ROPE = frozenset({None, "default", "linear", "llama3", "yarn"})
_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention"})
# GPT-2's own eager attention reads these; transformers 4 does not tell a swapped function of them.
_SCALED_BY_LAYER = ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn")

_SEQ2SEQ = (
    "Use --task text2text-generation, or automatic-speech-recognition for speech, with --backend "
    "optimum, in an environment with lora-edge[optimum]."
)
OPTIMUM = "Capture it with --backend optimum, in an environment with lora-edge[optimum]."
"""The way out for what tracing cannot do."""


class _Refusal(NamedTuple):
    field: str
    value: Any
    reason: str
    hint: str = OPTIMUM


def refuse_unloadable(config: Mapping[str, Any], task: Task = TEXT) -> None:
    """Refuse a model that no backend of this release takes.

    Args:
        config: the content of ``config.json``.
        task: what it is to do.

    Raises:
        UnsupportedModelError: the field, its value and the reason.
    """
    _refuse(config, _unloadable(config, task.seq2seq))


def refuse_untraceable(config: Mapping[str, Any], task: Task = TEXT) -> None:
    """Refuse a model that tracing is known to get wrong.

    Args:
        config: ``config.json`` with transformers' defaults filled in.
        task: what it is to do; an encoder-decoder is not traced.

    Raises:
        UnsupportedModelError: the field, its value and the reason.
    """
    if not task.seq2seq:
        _refuse(config, _untraceable(config))


def experts_field(config: Mapping[str, Any]) -> str | None:
    """``name is value`` of the field that says that a model has experts, if one does."""
    if config.get("is_moe") is False:  # Doge's layers have experts only if it says so
        return None
    for field in _EXPERT_FIELDS:
        value = config.get(field)
        if isinstance(value, int) and value > 1:
            return f"{field} is {value}"
    return None


def _refuse(config: Mapping[str, Any], refusals: Iterator[_Refusal]) -> None:
    for field, value, reason, hint in refusals:
        raise UnsupportedModelError(
            f"{config.get('model_type')} models are refused: {field} is {value!r}: {reason}", hint
        )


def _unloadable(config: Mapping[str, Any], seq2seq: bool) -> Iterator[_Refusal]:
    if config.get("quantization_config"):
        yield _Refusal(
            "quantization_config",
            config["quantization_config"].get("quant_method"),
            "a quantized checkpoint has no full-precision weights",
            "Give the full-precision base; a QLoRA adapter works on it too.",
        )
    if bool(config.get("is_encoder_decoder")) is not seq2seq:
        yield _Refusal(
            "is_encoder_decoder",
            config.get("is_encoder_decoder"),
            "the task needs an encoder-decoder"
            if seq2seq
            else "an encoder-decoder is neither traced nor run as one graph",
            "Use a task that fits the model." if seq2seq else _SEQ2SEQ,
        )
    for field in ("vision_config", "audio_config"):
        if config.get(field):
            yield _Refusal(
                field,
                "set",
                "this release exports text models only",
                "Save the language model alone, as docs/bases.md says, and give that folder.",
            )


def _untraceable(config: Mapping[str, Any]) -> Iterator[_Refusal]:
    if config.get("alibi") or config.get("model_type") in _ALIBI:
        yield _Refusal("alibi", True, "ALiBi positions are not in the attention operator")
    if config.get("model_type") in _RECURRENT:
        yield _Refusal(
            "model_type",
            config["model_type"],
            "its layers keep a recurrent state, which is no attention's cache",
        )
    for field in _SCALED_BY_LAYER:
        if config.get(field):
            yield _Refusal(field, True, "the scores are scaled outside the attention function")
    if config.get("scale_attn_weights") is False:
        yield _Refusal("scale_attn_weights", False, "the attention function is not told of it")
    strange = sorted(set(config.get("layer_types") or ()) - _ATTENTION_LAYERS)
    if strange:
        yield _Refusal("layer_types", strange[0], "only causal attention layers are known")
    for kind in _rope_types(config):
        if kind not in _STATIC_ROPE:
            yield _Refusal(
                "rope_type",
                kind,
                "its frequencies may change with the length, and a trace keeps one branch only",
            )


def _rope_types(config: Mapping[str, Any]) -> list[str | None]:
    """Every rotary kind of the config; transformers 5 may nest one for each type of layer."""
    kinds: list[str | None] = []
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name) or {}
        nested = [value for value in rope.values() if isinstance(value, Mapping)]
        kinds += [part.get("rope_type", part.get("type")) for part in (rope, *nested)]
    return kinds
