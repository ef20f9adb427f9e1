"""What is refused by name for its config, in both modes or in one of them.

Knows what each field of a PEFT config means for the numbers (``peft/tuners/lora/config.py``); reads
no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from lora_edge.adapter.types import MERGE_FIRST, type_refusal

Mode = Literal["switchable", "merged"]
MODES: tuple[Mode, ...] = ("switchable", "merged")


class Refusal(NamedTuple):
    """Why an adapter is refused in some modes, and the way out."""

    message: str
    hint: str
    modes: tuple[Mode, ...] = MODES


# Fields that the readers use, or that change no number at inference beyond which tensors exist.
# fmt: off
_KNOWN_FIELDS = frozenset({
    "alora_invocation_tokens", "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias",
    "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "merge_weights", "modules_to_save", "monteclora_config", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "target_parameters", "task_type", "trainable_token_indices", "use_dora", "use_rslora",
    "velora_config",
})
# fmt: on
# field -> (the values at which it has no effect, the reason, the way out)
_REFUSED_FIELDS: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "layer_replication": (
        (None, []),
        "it changes the base's architecture",
        "Save the replicated model as a base of its own, and train on that.",
    ),
    "use_qalora": ((False, None), "QALoRA pools the input", "Train a plain LoRA."),
    "use_bdlora": ((False, None), "BD-LoRA's factors are block-diagonal", MERGE_FIRST),
    "arrow_config": ((None,), "Arrow routes between adapters per token", "Export them one by one."),
    "kasa_config": ((None,), "KaSA truncates the base's weights", MERGE_FIRST),
}
_ORDINARY_INITS = (True, False, None, "gaussian", "eva", "mica", "orthogonal")
_CONVERTIBLE_INITS = ("pissa", "olora", "corda", "lora_ga")
# What an activated LoRA cannot have besides: the rest would work on every token.
_NOT_WITH_ALORA: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("use_dora", (False, None)),
    ("lora_bias", (False, None)),
    ("bias", ("none", None)),
    ("modules_to_save", (None, [])),
    ("trainable_token_indices", (None, [], {})),
    ("target_parameters", (None, [])),
)


def config_refusals(config: Mapping[str, Any]) -> Iterable[Refusal]:
    """Each reason to refuse an adapter for its config."""
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        yield Refusal(*type_refusal(peft_type))
        return
    yield from _init_refusals(config)
    for field, value in config.items():
        if field in _REFUSED_FIELDS:
            neutral, reason, hint = _REFUSED_FIELDS[field]
            if value not in neutral:
                yield Refusal(f"{field} is {value!r}: {reason}", hint)
        elif field not in _KNOWN_FIELDS and value:
            yield Refusal(
                f"the config field {field} is {value!r}, and this release does not know it",
                "Update lora-edge, or set the field to its default if it does not matter.",
            )
    bias = config.get("bias", "none")
    if bias not in ("none", "all", "lora_only", None):
        yield Refusal(
            f"bias is {bias!r}, expected none, all or lora_only",
            "PEFT knows no other; correct it in adapter_config.json.",
        )
    if config.get("use_dora") and config.get("lora_bias"):
        yield Refusal(
            "use_dora and lora_bias are both set, which PEFT itself does not support",
            "Train with one of the two.",
        )
    yield from _alora_refusals(config)
    parameters = config.get("target_parameters") or ()
    # A parameter called weight may be a linear layer's; the base tells.
    if any(str(x).rpartition(".")[2] != "weight" for x in parameters):
        yield Refusal(
            f"target_parameters is {config['target_parameters']!r}: an expert's weights are chosen "
            "for each token, and have no branch",
            "Use --mode merged, or train with target_modules on linear layers.",
            ("switchable",),
        )


def _init_refusals(config: Mapping[str, Any]) -> Iterable[Refusal]:
    init = config.get("init_lora_weights", True)
    name = init.lower() if isinstance(init, str) else init
    if name in _ORDINARY_INITS:
        return
    # LoftQ changes the base by more than its factors, so there is nothing to subtract. PEFT refuses
    # to convert rsLoRA with patterns, too (LoraModel._convert_state_dict_for_initial_model).
    patterns = config.get("rank_pattern") or config.get("alpha_pattern")
    converted = str(name).startswith(_CONVERTIBLE_INITS) and not (
        config.get("use_rslora") and patterns
    )
    yield Refusal(
        f"init_lora_weights is {init!r}: training changed the base weights too",
        "Save it as an ordinary LoRA with save_pretrained(..., "
        "path_initial_model_for_weight_conversion=...), then export that."
        if converted
        else "Save the base that it was trained on (model.unload(), then save_pretrained), set "
        "init_lora_weights to true in adapter_config.json, and export with that base.",
    )


def _alora_refusals(config: Mapping[str, Any]) -> Iterable[Refusal]:
    invocation = config.get("alora_invocation_tokens")
    if not invocation:
        return
    yield Refusal(
        f"alora_invocation_tokens is {invocation!r}: an activated LoRA works from its invocation "
        "on only, and weights cannot tell tokens apart",
        "Use --mode switchable.",
        ("merged",),
    )
    for field, neutral in _NOT_WITH_ALORA:
        if config.get(field) not in neutral:
            yield Refusal(
                f"{field} is {config[field]!r} together with alora_invocation_tokens: it would "
                "work on every token",
                "Train the activated LoRA with low-rank factors only.",
            )
