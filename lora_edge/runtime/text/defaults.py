"""How a model wants to be asked: ``generation_config.json``, as transformers' ``generate`` does it.

Knows the files; knows nothing of sessions or tokenizers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_edge.errors import BundleError, DataError, OptionError
from lora_edge.files.json import read_object
from lora_edge.runtime.sampling import Sampling

DEFAULTS_FILES = ("generation_config.json", "config.json")
_HINT = "Copy it again, or correct it in the base and export again."
# What changes tokens and is not followed, with the value that changes nothing.
_OTHERS: Mapping[str, Any] = {
    "min_length": 0,
    "min_new_tokens": 0,
    "max_length": 20,
    "max_time": None,
    "stop_strings": None,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0.0,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "token_healing": False,
    "guidance_scale": 1.0,
    "watermarking_config": None,
}
_BEAMS_ONLY = {"length_penalty": 1.0, "early_stopping": False}


@dataclass(frozen=True)
class GenerationDefaults:
    """What a model's files say of generation.

    Attributes:
        sampling: how tokens are chosen; greedy where the files do not ask for samples.
        eos_ids: the tokens that end a completion.
        max_new_tokens: at most so many new tokens; ``None`` where the files do not say.
        not_followed: ``key=value`` of what transformers would do and this runtime does not.
    """

    sampling: Sampling = field(default_factory=Sampling)
    eos_ids: frozenset[int] = frozenset()
    max_new_tokens: int | None = None
    not_followed: tuple[str, ...] = ()


def read_defaults(directory: Path) -> GenerationDefaults:
    """The defaults of a model folder: of ``generation_config.json``, else of ``config.json``.

    Where the first is there, it alone counts, though it name no end token; so does transformers.

    Raises:
        BundleError: a file cannot be read, or has a value that is none.
    """
    file = next((directory / name for name in DEFAULTS_FILES if (directory / name).is_file()), None)
    if file is None:
        return GenerationDefaults()
    found = read_object(file, BundleError, _HINT, nonfinite=True)
    given = {key: value for key, value in found.items() if value is not None}
    own = file.name == DEFAULTS_FILES[0]
    penalty = _number(file, given, "repetition_penalty", 1.0)
    if given.get("do_sample") is True:
        # The defaults are transformers' own: top_k is 50 unless the file says otherwise.
        chosen = {
            "temperature": _number(file, given, "temperature", 1.0),
            "top_k": _whole(file, given, "top_k", 50),
            "top_p": _number(file, given, "top_p", 1.0) or 1e-12,  # 0: the likeliest token
            "min_p": _number(file, given, "min_p", 0.0),
        }
    else:
        chosen = {}
    try:
        sampling = Sampling(**chosen, repetition_penalty=penalty)  # type: ignore[arg-type]
    except DataError as error:
        raise BundleError(f"{file}: {error}", _HINT) from error
    others = {**_OTHERS, **(_BEAMS_ONLY if given.get("num_beams", 1) != 1 else {})}
    left = [
        key for key, neutral in others.items() if given.get(key, neutral) not in (neutral, None)
    ]
    return GenerationDefaults(
        sampling,
        _eos(file, given),
        _whole(file, given, "max_new_tokens", 0) or None,
        # A config.json of old holds the defaults of every model; its lists are a model's own.
        tuple(f"{key}={given[key]!r}" for key in left if own or given[key]),
    )


def _eos(file: Path, given: Mapping[str, Any]) -> frozenset[int]:
    found = given.get("eos_token_id", [])
    ids = found if isinstance(found, list) else [found]
    for one in ids:
        if isinstance(one, bool) or not isinstance(one, int):
            raise BundleError(
                f"{file}: eos_token_id is {found!r:.200}, expected a token id or a list of them",
                _HINT,
            )
    return frozenset(ids)


def _number(file: Path, given: Mapping[str, Any], key: str, default: float) -> float:
    value = given.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BundleError(f"{file}: {key} is {value!r:.200}, expected a finite number", _HINT)
    return float(value)


def _whole(file: Path, given: Mapping[str, Any], key: str, default: int) -> int:
    value = given.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BundleError(f"{file}: {key} is {value!r:.200}, expected 0 or more", _HINT)
    return value


def choices(
    model: GenerationDefaults | None, given: Mapping[str, Any], max_new_tokens: int | None
) -> tuple[Sampling, int]:
    """How tokens are chosen, and how many: what is given, else what the model says, else ours.

    Args:
        model: the model's defaults; ``None``: they are not asked for.
        given: fields of :class:`Sampling`; ``None`` is not given.
        max_new_tokens: ``None``: the model's, else 64.

    Raises:
        OptionError, DataError: a value of a wrong type, or outside its range.
    """
    own = GenerationDefaults() if model is None else model
    named = {key: value for key, value in given.items() if value is not None}
    sampling = dataclasses.replace(own.sampling, **named)
    if max_new_tokens is None:
        max_new_tokens = own.max_new_tokens or 64
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
        raise OptionError(
            f"max_new_tokens is {max_new_tokens!r:.100}, expected a whole number",
            "Pass a number such as 64.",
        )
    return sampling, max_new_tokens
