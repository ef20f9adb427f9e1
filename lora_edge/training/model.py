"""The base model and its tokenizer in PyTorch.

Knows transformers; knows nothing of PEFT, data or the training loop.
"""

from __future__ import annotations

from typing import Any

from lora_edge.base.checkpoint import Base
from lora_edge.base.tokenizer import read_tokenizer
from lora_edge.errors import BaseModelError, UnsupportedModelError
from lora_edge.tasks.task import TEXT, Task

_NAMES_SHOWN = 8


def load_tokenizer(base: Base) -> Any:
    """The base's own tokenizer.

    Raises:
        BaseModelError: it has none, or transformers cannot read it.
    """
    return read_tokenizer(base.directory, BaseModelError).tokenizer


def load_model(base: Base, task: Task = TEXT, base_format: str = "fp32") -> Any:
    """The base, every weight of it from the checkpoint.

    Args:
        base: the model.
        task: what it is to do; its head may be missing, and is made anew.
        base_format: ``fp32``, ``bf16``, or ``4bit`` (on CUDA, with bitsandbytes).

    Raises:
        UnsupportedModelError: a quantized checkpoint, or no model of that kind.
        BaseModelError: the weights cannot be read, or some are missing.
    """
    import torch
    import transformers

    from lora_edge.base.model import load_whole

    if "quantization_config" in base.config:
        raise UnsupportedModelError(
            f"{base.name_or_path} is a quantized checkpoint",
            "Train on the full-precision model that it was made from.",
        )
    options: dict[str, Any] = {}
    if base_format == "4bit":
        # QLoRA's own format (Dettmers et al. 2023, section 3).
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        options["device_map"] = {"": torch.cuda.current_device()}
    dtype = torch.float32 if base_format == "fp32" else torch.bfloat16
    try:
        return load_whole(base, task, dtype=dtype, attention=None, **options)
    except BaseModelError as error:
        if "Unrecognized" not in str(error) and "does not recognize" not in str(error):
            raise
        raise UnsupportedModelError(
            f"{base.name_or_path} (model_type {base.model_type}) is no model for "
            f"{task.name} that this transformers knows",
            f"Train a model that {task.loader} loads, or update transformers.",
        ) from error


def some(names: list[str]) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def first_line(error: Exception) -> str:
    """The first line of an error's message, its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
