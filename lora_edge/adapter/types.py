"""PEFT's adapter types: which of them can be turned into a LoRA, and why the others cannot.

Knows names only (``peft/utils/peft_types.py``, each tuner's ``supports_lora_conversion``); reads no
files.
"""

from __future__ import annotations

from typing import Any

CONVERTIBLE = frozenset({
    "C3A", "DELORA", "FOURIERFT", "GRALORA", "LOHA", "LOKR", "MISS", "PSOFT", "RANDLORA",
    "TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT",
})  # fmt: skip
"""They add a delta to the weights of linear layers, which ``peft.convert_to_lora`` factorizes."""

MERGE_FIRST = "Merge it with peft (merge_and_unload) and export the result as a base model."
_TRAIN = "Train a LoRA instead: nothing of it can be merged or converted."
_PROMPT = ("it adds learned tokens or cache entries and changes no weight", _TRAIN)
_MULTIPLIES = (
    "it multiplies the base's weights, which adding a low-rank delta cannot",
    MERGE_FIRST,
)
_ROUTES = ("it mixes several adapters for each input", _TRAIN)
_NO_PEFT = ("PEFT has no conversion to LoRA for it", MERGE_FIRST)
# peft_type -> (why it is no LoRA and does not become one, the way out)
_REFUSED: dict[str, tuple[str, str]] = {
    "ADALORA": ("its singular values are a third factor, which PEFT does not convert", MERGE_FIRST),
    "ADAPTION_PROMPT": _PROMPT,
    "BOFT": _MULTIPLIES,
    "BONE": (
        "peft has replaced it by MiSS",
        "Make it MiSS with peft's scripts/convert-bone-to-miss.py, then use --convert RANK.",
    ),
    "CARTRIDGE": _PROMPT,
    "CPT": _PROMPT,
    "DEFT": _NO_PEFT,
    "FROD": _NO_PEFT,
    "GLORA": _NO_PEFT,
    "HIRA": _MULTIPLIES,
    "HRA": _MULTIPLIES,
    "IA3": _MULTIPLIES,
    "LN_TUNING": ("it replaces norms", MERGE_FIRST),
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "OFT": _MULTIPLIES,
    "OSF": _NO_PEFT,
    "PEANUT": _NO_PEFT,
    "POLY": _ROUTES,
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "PVERA": _NO_PEFT,
    "P_TUNING": _PROMPT,
    "ROAD": _MULTIPLIES,
    "SHIRA": ("its delta is sparse, which PEFT does not convert", MERGE_FIRST),
    "SUPERTUNING": _NO_PEFT,
    "XLORA": _ROUTES,
}


def type_refusal(peft_type: Any) -> tuple[str, str]:
    """Why an adapter that is not of type ``LORA`` is refused, and the way out."""
    message = f"peft_type is {peft_type!r}, expected 'LORA'"
    if peft_type in CONVERTIBLE:
        return (
            message,
            "Export it with --convert RANK: that approximates it by a LoRA of this rank and "
            "reports the error.",
        )
    if peft_type in _REFUSED:
        reason, hint = _REFUSED[peft_type]
        return f"{message}: {reason}", hint
    return (
        f"{message}: this release cannot export or convert it",
        "If peft can merge it (merge_and_unload), export the result as a base model; otherwise "
        "train a LoRA.",
    )
