"""Fresh LoRA factors on a base model, and how they are saved; what PEFT would pass over is refused.

Knows PEFT; knows nothing of data or the training loop.
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lora_edge.adapter.targets import check_patterns, fullmatch, pattern_key
from lora_edge.errors import AdapterError
from lora_edge.files.json import read_object
from lora_edge.tasks.task import TEXT, Task
from lora_edge.training.model import first_line, some
from lora_edge.training.settings import ALL_LINEAR, CONVERTED_INITS, Settings

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def add_lora(model: Any, settings: Settings, base_name: str, task: Task = TEXT) -> Any:
    """Wrap ``model`` in PEFT's, with factors as ``settings`` say; a task's head is trained.

    Raises:
        AdapterError: a target, pattern, layer or module to save that matches nothing, or a target
            that is not linear.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if settings.base_format == "4bit":
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=settings.gradient_checkpointing
        )
    names = _names(model, settings, task)
    _check_targets(model, names)
    _check_layers(model, names, settings.layers)
    _check_saved(model, settings.modules_to_save)
    config = LoraConfig(
        task_type=_task_type(task),
        r=settings.rank,
        lora_alpha=_whole(settings.alpha),
        target_modules=names if isinstance(names, str) else list(names),
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern={key: _whole(value) for key, value in settings.alpha_pattern.items()},
        lora_dropout=settings.dropout,
        bias=settings.bias,
        modules_to_save=_saved(settings, task),
        layers_to_transform=list(settings.layers) or None,
        init_lora_weights=True if settings.init == "default" else settings.init,
        fan_in_fan_out=_is_conv1d(model, names, task),
    )
    paths = [path for path, _ in model.named_modules()]
    check_patterns(
        {
            "target_modules": names,
            "modules_to_save": _saved(settings, task),
            "rank_pattern": settings.rank_pattern,
            "alpha_pattern": settings.alpha_pattern,
        },
        paths,
    )
    try:
        with _quiet_peft():
            wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise AdapterError(
            f"PEFT refuses these targets: {first_line(error)}", "Change --target-modules."
        ) from error
    wrapped.peft_config["default"].base_model_name_or_path = base_name
    adapted = adapted_paths(wrapped)
    for option, pattern in (
        ("rank_pattern", settings.rank_pattern),
        ("alpha_pattern", settings.alpha_pattern),
    ):
        for key in pattern:
            # PEFT's own rule (peft.utils.get_pattern_key); it passes over a key without a match.
            if not any(pattern_key([key], path) for path in adapted):
                raise AdapterError(
                    f"{option} key {key!r} matches none of the {len(adapted)} adapted modules",
                    f"They are named like {some(_endings(adapted))}.",
                )
    return wrapped


def adapted_paths(wrapped: Any) -> list[str]:
    """Paths of the modules that have factors, in the model's order."""
    return [
        name
        for name, module in wrapped.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    ]


def save_adapter(
    wrapped: Any,
    directory: Path,
    settings: Settings,
    start: Path | None,
    weights: dict[str, Any] | None = None,
) -> None:
    """Write PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``, the same each time.

    Args:
        wrapped: the trained model.
        directory: an existing folder.
        settings: what it was made with.
        start: folder with the untrained adapter, from which an ``init`` that changed the base is
            converted; ``None``: the factors are written as they are.
        weights: what is trained, where the model itself holds a share of it only.
    """
    options: dict[str, Any] = {} if weights is None else {"state_dict": weights}
    if start is not None:
        options["path_initial_model_for_weight_conversion"] = str(start)
    with _quiet_peft():
        wrapped.save_pretrained(directory, save_embedding_layers=False, **options)
    (directory / "README.md").unlink(missing_ok=True)  # PEFT's form with nothing filled in
    config_file = directory / CONFIG_NAME
    config = read_object(config_file, AdapterError, "Run it again.", nonfinite=True)
    if settings.init in CONVERTED_INITS:
        config["init_lora_weights"] = True
    # PEFT writes a set in the order of the process's string hashes, which differs from run to run.
    for name in ("target_modules", "modules_to_save"):
        if isinstance(config[name], list):
            config[name] = sorted(config[name])
    # PEFT sorts the patterns' keys, and the first match wins: sorted, they can mean something else.
    for option, given in (
        ("rank_pattern", settings.rank_pattern),
        ("alpha_pattern", settings.alpha_pattern),
    ):
        config[option] = {key: config[option][key] for key in given}
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _quiet_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        # PEFT asks transformers for a property by its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        # So that it can be converted back, the untrained adapter is loaded beside the trained one.
        warnings.filterwarnings("ignore", ".* changes the base weights of the model", UserWarning)
        # Refused by add_lora.
        warnings.filterwarnings("ignore", "The following .*_pattern keys did", RuntimeWarning)
        # Tied weights in modules_to_save: the export untangles them, from the keys.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        warnings.filterwarnings("ignore", "Model with `tie_word_embeddings=True`", UserWarning)
        yield


def _task_type(task: Task) -> str | None:
    return task.facts.peft_type or None


def _saved(settings: Settings, task: Task) -> list[str] | None:
    saved = list(settings.modules_to_save)
    if not task.facts.peft_type:  # with a type, PEFT adds the head itself
        saved.append("classifier")
    return saved or None


def _names(model: Any, settings: Settings, task: Task) -> str | tuple[str, ...]:
    """The targets as PEFT takes them: it takes ``layers_to_transform`` beside names only."""
    if not (settings.layers and settings.all_linear):
        return settings.target_modules
    inside = [
        path
        for path, module in _linears(model).items()
        if not _is_head(model, path, module, task) and _LAYER.search(path)
    ]
    return tuple(_endings(inside))


def _check_layers(model: Any, names: str | tuple[str, ...], layers: tuple[int, ...]) -> None:
    hit = [
        path
        for path in _linears(model)
        if not isinstance(names, str) and any(_matches(path, name, regex=False) for name in names)
    ]
    found = {int(match[1]) for match in map(_LAYER.search, hit) if match}
    lost = [str(layer) for layer in layers if layer not in found]
    if lost:
        raise AdapterError(
            f"layers {', '.join(lost)} have none of the target modules",
            f"Layers that have some: {', '.join(map(str, sorted(found))) or 'none'}.",
        )


def _check_saved(model: Any, names: tuple[str, ...]) -> None:
    paths = [name for name, _ in model.named_modules() if name]
    for name in names:
        if not any(_matches(path, name, regex=False) for path in paths):
            raise AdapterError(
                f"modules_to_save {name!r} matches no module of the base",
                f"Its modules end in {some(_endings(paths))}.",
            )


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
                f"Its linear modules are {some(_endings(linears))}.",
            )
        others = [path for path in hit if path not in linears]
        if others:
            raise AdapterError(
                f"target module {target!r} matches {others[0]}, which is not a linear layer",
                f"Its linear modules are {some(_endings(linears))}.",
            )


def _matches(path: str, target: str, *, regex: bool) -> bool:
    if regex:
        return fullmatch(target, path)
    return path == target or path.endswith(f".{target}")


def _is_conv1d(model: Any, targets: str | tuple[str, ...], task: Task) -> bool:
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


def _is_head(model: Any, path: str, module: Any, task: Task) -> bool:
    return task.in_head(path) or module is model.get_output_embeddings()


def _endings(paths: Iterable[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})


def _whole(value: float) -> float:
    """16 rather than 16.0 in the file, as PEFT's other writers have it."""
    return int(value) if float(value).is_integer() else value
