"""What is refused by name: the fields of a PEFT config, and the kinds of tensors.

Knows what each of them means for the numbers (``peft/tuners/lora/config.py``); reads no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lora_edge.peft_types import MERGE_FIRST, type_refusal

# Fields that this module uses, or that change no number at inference beyond which tensors exist.
# fmt: off
_KNOWN_FIELDS = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
})
# fmt: on
# field -> (the values at which it has no effect, the reason, the way out)
_REFUSED_FIELDS: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "use_dora": ((False, None), "DoRA rescales the base's output rows", MERGE_FIRST),
    "lora_bias": ((False, None), "its B factors have a bias of their own", MERGE_FIRST),
    "bias": (("none", None), "it replaces biases of the base", MERGE_FIRST),
    "modules_to_save": ((None, []), "it replaces whole modules of the base", MERGE_FIRST),
    "trainable_token_indices": (
        (None, [], {}),
        "it replaces rows of the embedding",
        MERGE_FIRST,
    ),
    "target_parameters": (
        (None, []),
        "it adapts 3-D expert weights",
        "Train with target_modules on linear layers instead.",
    ),
    "alora_invocation_tokens": (
        (None, []),
        "an activated LoRA works on some tokens only",
        "Train a plain LoRA, or wait for a release that exports aLoRA.",
    ),
    "layer_replication": (
        (None, []),
        "it changes the base's architecture",
        "Save the replicated model as a base of its own, and train on that.",
    ),
    "use_qalora": ((False, None), "QALoRA pools the input", "Train a plain LoRA."),
    "use_bdlora": ((False, None), "BD-LoRA's factors are block-diagonal", "Train a plain LoRA."),
    "arrow_config": ((None,), "Arrow routes between adapters per token", "Export them one by one."),
    "kasa_config": ((None,), "KaSA truncates the base's weights", MERGE_FIRST),
    "velora_config": ((None,), "VeLoRA is not supported yet", "Train a plain LoRA."),
    "monteclora_config": ((None,), "MonteCLoRA samples its factors", "Train a plain LoRA."),
}
_ORDINARY_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# suffix of a tensor key that is not a plain factor -> what it is
_TENSOR_KINDS = {
    "lora_magnitude_vector": "a DoRA magnitude",
    "lora_embedding_A": "an embedding LoRA factor",
    "lora_embedding_B": "an embedding LoRA factor",
    "lora_B.bias": "a bias of a B factor",
    "trainable_tokens_delta": "trained token rows",
    "base_layer.weight": "a saved weight of the base",
    "base_layer.bias": "a trained bias of the base",
    "modules_to_save": "a replaced module",
}


def config_refusals(config: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Each reason to refuse an adapter for its config, and the way out."""
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        yield type_refusal(peft_type)
        return
    init = config.get("init_lora_weights", True)
    if init not in _ORDINARY_INITS:
        yield (
            f"init_lora_weights is {init!r}: training changed the base weights too",
            "Save it as an ordinary LoRA with save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), then export that.",
        )
    for field, value in config.items():
        if field in _REFUSED_FIELDS:
            neutral, reason, hint = _REFUSED_FIELDS[field]
            if value not in neutral:
                yield f"{field} is {value!r}: {reason}", hint
        elif field not in _KNOWN_FIELDS and value:
            yield (
                f"the config field {field} is {value!r}, and this release does not know it",
                "Update lora-edge, or set the field to its default if it does not matter.",
            )


def tensor_refusal(key: str) -> str:
    """What a tensor that is no LoRA factor is, for a message."""
    kind = next((what for mark, what in _TENSOR_KINDS.items() if mark in key), "not a LoRA factor")
    return f"tensor {key!r} is {kind}"
