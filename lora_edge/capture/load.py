"""Loading the PyTorch model that is captured, whole or not at all."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lora_edge.base import Base
from lora_edge.capture.experts import refuse_loops
from lora_edge.capture.families import (
    OPTIMUM,
    experts_field,
    refuse_unloadable,
    refuse_untraceable,
)
from lora_edge.capture.swaps import is_linear
from lora_edge.errors import BaseModelError, UnsupportedModelError


def load_model(base: Base, attention: str | None) -> Any:
    """The model in fp32 on the CPU, in evaluation mode.

    Args:
        base: the model's folder.
        attention: the registered attention function to trace it with; ``None`` for the model's own
            eager one.

    Raises:
        UnsupportedModelError: the architecture is refused.
        BaseModelError: transformers cannot load the model, or would make up some of its weights.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    refuse_unloadable(base.config)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(base.directory)
        if attention is not None:
            refuse_untraceable(config.to_dict())
        field = experts_field(config.to_dict())
        if field is not None:
            with torch.device("meta"):  # before any weight is loaded
                empty = AutoModelForCausalLM.from_config(copy.deepcopy(config))
            refuse_loops(empty, base.model_type, field)
        model, loading = AutoModelForCausalLM.from_pretrained(
            base.directory,
            # A model keeps its config and writes into it, so this one must be its own.
            config=copy.deepcopy(config),
            dtype=torch.float32,
            attn_implementation=attention or "eager",
            output_loading_info=True,
        )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        ImportError,
        SafetensorError,
        StrictDataclassError,
    ) as error:
        said = " ".join(str(error).split())[:300] or repr(error)
        if attention is not None and attention in said:
            raise UnsupportedModelError(
                f"{base.model_type} models are refused: they have no common attention interface",
                OPTIMUM,
            ) from error
        raise BaseModelError(
            f"{base.name_or_path} cannot be loaded as a causal language model: {said}",
            "Check that transformers itself can load it.",
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    # transformers fills these in at random and only warns.
    random = sorted(loading["missing_keys"]) + [str(x[0]) for x in loading["mismatched_keys"]]
    if random:
        raise BaseModelError(
            f"{base.name_or_path} lacks {len(random)} of its weights, or has them in another "
            f"shape: {', '.join(random[:3])}",
            "Download the whole checkpoint, or save it again with save_pretrained().",
        )
    refuse_loops(model, base.model_type, None)
    return model.eval()


def max_length(config: Any) -> int:
    """Positions of the longest sequence that a model takes.

    Raises:
        UnsupportedModelError: its config does not say.
    """
    value = getattr(config, "max_position_embeddings", None)
    if isinstance(value, int) and value > 0:
        return value
    raise UnsupportedModelError(
        f"{config.model_type} models are refused: max_position_embeddings is {value!r}",
        "Set it in config.json to the longest sequence that the model may see.",
    )


def linear_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Module path -> ``(in, out)`` of every linear layer."""
    return {path: _sizes(module) for path, module in model.named_modules() if is_linear(module)}


def _sizes(module: Any) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    rows, columns = module.weight.shape
    return int(rows), int(columns)
