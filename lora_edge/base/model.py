"""The one loader of a base in PyTorch: whole, or not at all."""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from lora_edge.base.checkpoint import Base
from lora_edge.base.experts import refuse_loops
from lora_edge.base.families import OPTIMUM, experts_field, refuse_unloadable, refuse_untraceable
from lora_edge.base.layer import Layer
from lora_edge.base.linear import is_linear
from lora_edge.base.quiet import quiet
from lora_edge.errors import BaseModelError, UnsupportedModelError
from lora_edge.tasks.task import Task

_LAYERS = 1024  # more only where the checkpoint has more tensors
_LARGEST = 1 << 40
_COUNTS_LAYERS = re.compile(r"layers?$|blocks?$|depth$|groups$")


def load_model(base: Base, attention: str | None, task: Task, *, stored: bool = False) -> Any:
    """The model that is captured: in fp32 on the CPU, in evaluation mode.

    Args:
        base: the model's folder.
        attention: the registered attention function to trace it with; ``None`` for the model's own
            eager one.
        task: what it is to do.
        stored: as :func:`load_whole`.

    Raises:
        UnsupportedModelError: the architecture is refused.
        BaseModelError: as :func:`load_whole`.
    """
    refuse_unloadable(base.config, task)
    with loading(base, task, attention):
        config = read_config(base, task)
        if attention is not None:
            refuse_untraceable(config.to_dict())
        refuse_experts(base, config, task)  # before any weight is loaded
    # A model keeps its config and writes into it, so this one must be its own.
    own = copy.deepcopy(config)
    model = load_whole(base, task, attention=attention or "eager", config=own, stored=stored)
    refuse_loops(model, base.model_type, None)
    return model


def load_whole(
    base: Base,
    task: Task,
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    attention: str | None = "eager",
    config: Any = None,
    pooler: bool = False,
    stored: bool = False,
    **options: Any,
) -> Any:
    """transformers' model of a base, in evaluation mode: whole, or not at all.

    Everything that loads a model loads it here.

    Args:
        base: the model's folder.
        task: what it is to do.
        dtype: of the weights; ``auto``: the checkpoint's own.
        attention: an attention function's name; ``None``: the one that transformers takes.
        config: transformers' config; ``None``: one of its own.
        pooler: keep a pooler that the task does not read.
        stored: leave the matrices in the checkpoint's dtype, mapped from its file, in a model that
            is otherwise of ``dtype``; with a release of transformers that cannot do that they have
            the ``dtype`` too.
        options: more arguments of ``from_pretrained``.

    Raises:
        UnsupportedModelError: a registered attention function was asked for, and the model has no
            common attention interface.
        BaseModelError: transformers cannot load the model, or would make up some of its weights,
            the task's head apart.
    """
    import transformers

    registered = None if attention in (None, "eager") else attention
    plan = _as_stored() if stored else contextlib.nullcontext()
    with loading(base, task, registered), quiet(), plan:
        model, found = getattr(transformers, task.loader).from_pretrained(
            base.directory,
            config=read_config(base, task) if config is None else config,
            dtype=dtype,
            output_loading_info=True,
            attn_implementation=attention,
            # Told of below, and allowed for the head alone.
            ignore_mismatched_sizes=bool(task.heads),
            **options,
        )
    # transformers fills these in at random and only warns.
    random = sorted(found["missing_keys"]) + [str(x[0]) for x in found["mismatched_keys"]]
    random = task.complete(model, random, pooler=pooler)
    if random:
        raise BaseModelError(
            f"{base.name_or_path} lacks {len(random)} of its weights, or has them in another "
            f"shape: {', '.join(random[:3])}",
            "Download the whole checkpoint, or save it again with save_pretrained(); a head that "
            "an adapter brings may be missing, if it is named among the task's heads.",
        )
    return model.eval()


@contextmanager
def _as_stored() -> Iterator[None]:
    """Matrices keep the checkpoint's dtype when transformers loads a model, and are not copied."""
    from transformers import PreTrainedModel

    owner: Any = PreTrainedModel
    if not hasattr(owner, "_get_dtype_plan"):  # before transformers 5
        yield
        return

    def plan(model: Any, dtype: torch.dtype) -> dict[str, None]:  # noqa: ARG001
        names = [name for name, x in model.named_parameters() if x.ndim > 1]
        return {f"^(?:{'|'.join(map(re.escape, names))})$": None} if names else {}

    original = owner._get_dtype_plan
    owner._get_dtype_plan = plan
    try:
        yield
    finally:
        owner._get_dtype_plan = original


@contextmanager
def loading(base: Base, task: Task, attention: str | None) -> Iterator[None]:
    """What transformers raises where it cannot load a model, as an error of ours.

    Args:
        base: the model.
        task: what it is to do.
        attention: the registered attention function that it is given, if any.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        MemoryError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
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
            f"{base.name_or_path} cannot be loaded as a model for {task.name}: {said}",
            f"Check that transformers' {task.loader} can load it.",
        ) from error


def read_config(base: Base, task: Task) -> Any:
    """transformers' config of a base, its head sized for the task.

    Raises:
        BaseModelError: it counts more layers than a checkpoint of so few tensors has.
    """
    import transformers

    _refuse_counts(base)
    return transformers.AutoConfig.from_pretrained(base.directory, **task.labels)


def _refuse_counts(base: Base) -> None:
    """Building a model takes time for each layer, and nothing else would say how many there are."""
    most = max(_LAYERS, len(base.keys()))
    for name, value in _numbers(base.config):
        if value > _LARGEST or (_COUNTS_LAYERS.search(name) and value > most):
            raise BaseModelError(
                f"{base.name_or_path}: config.json has {name} {value:,}, and the checkpoint has "
                f"{len(base.keys())} tensors",
                "Download config.json again; it is not of this checkpoint.",
            )


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int):
            yield name, value


def empty_model(config: Any, task: Task) -> Any:
    """The model on the meta device; ``config`` is left as it is."""
    import transformers

    with torch.device("meta"):
        return getattr(transformers, task.loader).from_config(copy.deepcopy(config))


def refuse_experts(base: Base, config: Any, task: Task, model: Any = None) -> None:
    """Refuse a mixture of experts that cannot be captured.

    Args:
        base: the model.
        config: transformers' config of it.
        task: what it is to do.
        model: the model, if it is built already; its weights are not read.

    Raises:
        UnsupportedModelError: the field or module, the reason and the way out.
    """
    field = experts_field(config.to_dict())
    if field is None:
        return
    if not task.causal:
        raise UnsupportedModelError(
            f"{base.model_type} models are refused for {task.name}: {field}: mixtures of "
            "experts are captured for text generation only",
            "Use a dense model for this task.",
        )
    refuse_loops(empty_model(config, task) if model is None else model, base.model_type, field)


def model_layers(model: nn.Module) -> dict[str, Layer]:
    """Module path -> sizes and kind, of every layer that an adapter may change."""
    found = {path: _layer(module) for path, module in model.named_modules()}
    return {path: entry for path, entry in found.items() if entry is not None}


def tied_pair(model: Any) -> tuple[str, ...]:
    """Module paths of the embedding and of the output layer that shares its weight, or ()."""
    head = model.get_output_embeddings()
    embedding = None if head is None else model.get_input_embeddings()
    if embedding is None or head.weight is not embedding.weight:
        return ()
    return path_of(model, embedding), path_of(model, head)


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    """The module path of a module of a model."""
    found: str = next(path for path, module in model.named_modules() if module is wanted)
    return found


def _layer(module: Any) -> Layer | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return None
    shape = tuple(int(size) for size in weight.shape)
    bias = getattr(module, "bias", None) is not None
    if is_linear(module):
        transposed = not isinstance(module, nn.Linear)  # Conv1D of GPT-2
        size_in, size_out = shape if transposed else shape[::-1]
        return Layer(size_in, size_out, bias=bias, transposed=transposed)
    if isinstance(module, nn.Embedding):
        return Layer(shape[0], shape[1], kind="embedding")
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        size = math.prod(shape[2:])
        return Layer(
            module.in_channels * size,
            module.out_channels,
            kind="conv",
            bias=bias,
            refusal=_refused_convolution(module),
        )
    if weight.ndim == 1 and "Norm" in type(module).__name__:
        return Layer(shape[0], shape[0], kind="norm", bias=bias)
    return None


def _refused_convolution(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> str:
    """PEFT's A takes the base's stride and padding, neither its dilation nor its padding mode."""
    if any(d > 1 and k > 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)):
        return f"is a dilated convolution ({module.dilation}), and PEFT's A is not dilated"
    padded = module.padding not in ("valid", (0,) * len(module.kernel_size))
    if module.padding_mode != "zeros" and padded:
        return (
            f"is a convolution with padding_mode {module.padding_mode!r}, and PEFT's A pads with "
            "zeros"
        )
    return ""
