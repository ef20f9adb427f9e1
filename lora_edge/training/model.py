"""The base model in PyTorch with fresh LoRA factors; what PEFT would pass over is refused.

Knows transformers and PEFT; knows nothing of data or the training loop.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from lora_edge.base import Base
from lora_edge.errors import AdapterError, BaseModelError, UnsupportedModelError
from lora_edge.tasks import Task
from lora_edge.training.settings import ALL_LINEAR, Settings

_NAMES_SHOWN = 8


def load_tokenizer(base: Base) -> Any:
    """The base's own tokenizer.

    Raises:
        BaseModelError: it has none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base.directory, local_files_only=True)
    except Exception as error:  # any library below may fail on a damaged file
        raise BaseModelError(
            f"{base.name_or_path} has no tokenizer that can be read: {_first_line(error)}",
            "Copy the model's tokenizer files into its folder.",
        ) from error


def load_model(base: Base, task: Task | None = None) -> Any:
    """The base in float32, every weight of it from the checkpoint.

    Args:
        base: the model.
        task: ``None`` for a causal language model; else the head may be missing, and is made anew.

    Raises:
        UnsupportedModelError: a quantized checkpoint, or no model of that kind.
        BaseModelError: the weights cannot be read, or some are missing.
    """
    import torch
    import transformers

    if "quantization_config" in base.config:
        raise UnsupportedModelError(
            f"{base.name_or_path} is a quantized checkpoint",
            "Train on the full-precision model that it was made from.",
        )
    loader, options = "AutoModelForCausalLM", {}
    if task is not None:
        loader = task.loader
        options = {**task.labels, "ignore_mismatched_sizes": True}  # told of below
    try:
        model, info = getattr(transformers, loader).from_pretrained(
            base.directory,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # any library below may fail on a damaged file
        if "Unrecognized" in str(error) or "does not recognize" in str(error):
            what = "causal language model" if task is None else f"model for {task.name}"
            raise UnsupportedModelError(
                f"{base.name_or_path} (model_type {base.model_type}) is no {what} that this "
                "transformers knows",
                f"Train a model that {loader} loads, or update transformers.",
            ) from error
        raise BaseModelError(
            f"{base.name_or_path} cannot be loaded: {_first_line(error)}",
            "Check that the folder is complete.",
        ) from error
    missing = sorted(info["missing_keys"])
    if task is not None:
        missing = task.complete(model, missing + [str(x[0]) for x in info["mismatched_keys"]])
    if missing:
        raise BaseModelError(
            f"{base.name_or_path} lacks {len(missing)} weights of its model: {_some(missing)}",
            "Use a complete checkpoint: transformers would fill these with random numbers.",
        )
    return model


def add_lora(model: Any, settings: Settings, base_name: str, task: Task | None = None) -> Any:
    """Wrap ``model`` in PEFT's, with factors as ``settings`` say (B = 0); a task's head is trained.

    Raises:
        AdapterError: a target or pattern that matches nothing, or a target that is not linear.
    """
    from peft import LoraConfig, get_peft_model

    _check_targets(model, settings.target_modules)
    targets = settings.target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM" if task is None else "SEQ_CLS",
        r=settings.rank,
        lora_alpha=_whole(settings.alpha),
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=settings.rslora,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern={key: _whole(value) for key, value in settings.alpha_pattern.items()},
        lora_dropout=settings.dropout,
        fan_in_fan_out=_is_conv1d(model, targets, task),
    )
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers for a property by its old name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            # Refused below.
            warnings.filterwarnings("ignore", "The following .*_pattern keys did", RuntimeWarning)
            wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise AdapterError(
            f"PEFT refuses these targets: {_first_line(error)}", "Change --target-modules."
        ) from error
    wrapped.peft_config["default"].base_model_name_or_path = base_name
    adapted = [path for path, _ in _adapted(wrapped)]
    for option, pattern in (
        ("rank_pattern", settings.rank_pattern),
        ("alpha_pattern", settings.alpha_pattern),
    ):
        for key in pattern:
            # PEFT's own rule (peft.utils.get_pattern_key); it passes over a key without a match.
            if not any(re.match(rf"(.*\.)?({key})$", path) for path in adapted):
                raise AdapterError(
                    f"{option} key {key!r} matches none of the {len(adapted)} adapted modules",
                    f"They are named like {_some(_endings(adapted))}.",
                )
    return wrapped


def _adapted(wrapped: Any) -> Iterator[tuple[str, Any]]:
    for name, module in wrapped.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            yield name, module


def _linears(model: Any) -> dict[str, Any]:
    import torch
    from transformers.pytorch_utils import Conv1D

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    }


def _check_targets(model: Any, targets: str | tuple[str, ...]) -> None:
    if targets == ALL_LINEAR:
        return
    paths = [name for name, _ in model.named_modules() if name]
    linears = _linears(model)
    for target in (targets,) if isinstance(targets, str) else targets:
        hit = [path for path in paths if _matches(path, target, regex=isinstance(targets, str))]
        if not hit:
            kind = "regex" if isinstance(targets, str) else "name"
            raise AdapterError(
                f"the target modules' {kind} {target!r} matches no module of the base",
                f"Its linear modules are {_some(_endings(linears))}.",
            )
        others = [path for path in hit if path not in linears]
        if others:
            raise AdapterError(
                f"target module {target!r} matches {others[0]}, which is not a linear layer",
                f"Its linear modules are {_some(_endings(linears))}.",
            )


def _matches(path: str, target: str, *, regex: bool) -> bool:
    if regex:
        return re.fullmatch(target, path) is not None
    return path == target or path.endswith(f".{target}")


def _is_conv1d(model: Any, targets: str | tuple[str, ...], task: Task | None) -> bool:
    """Whether the targets keep their weight as ``[in, out]`` (GPT-2); PEFT wants to be told."""
    import torch

    found = {
        not isinstance(module, torch.nn.Linear)
        for path, module in _linears(model).items()
        if (targets == ALL_LINEAR and not _is_head(model, path, module, task))
        or any(
            _matches(path, target, regex=isinstance(targets, str))
            for target in ((targets,) if isinstance(targets, str) else targets)
        )
    }
    return found == {True}


def _is_head(model: Any, path: str, module: Any, task: Task | None) -> bool:
    return module is model.get_output_embeddings() if task is None else task.in_head(path)


def _endings(paths: Iterable[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _whole(value: float) -> float:
    """16 rather than 16.0 in the file, as PEFT's other writers have it."""
    return int(value) if float(value).is_integer() else value


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
