"""Loading the PyTorch model that is captured, whole or not at all."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_edge.base import Base
from lora_edge.capture.attention import RegisteredAttention
from lora_edge.capture.experts import refuse_loops
from lora_edge.capture.families import (
    OPTIMUM,
    experts_field,
    refuse_unloadable,
    refuse_untraceable,
)
from lora_edge.capture.swaps import is_linear
from lora_edge.errors import BaseModelError, UnsupportedModelError
from lora_edge.manifest import SiteEntry
from lora_edge.quiet import quiet
from lora_edge.tasks import Task

# What models and the exporter raise where a trace is not what they were written for.
_TRACE_FAILURES = (
    RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError,
    NotImplementedError, ArithmeticError, ImportError,
)  # fmt: skip


@contextmanager
def refusing(
    model: nn.Module, swap: RegisteredAttention, *, images: bool = False
) -> Iterator[None]:
    """What a model's own code or the exporter raises on a trace, as a refusal by name.

    Args:
        model: the model that is run or traced inside the block.
        swap: the attention that it was given.
        images: it may compute its attention in another way.
    """
    try:
        yield
    except _TRACE_FAILURES as error:
        config: Any = model.config
        said = " ".join(str(error).split())[:300] or type(error).__name__
        if swap.name in said:
            reason = "they do not use the common attention interface"
        else:
            reason = f"{type(model).__name__} cannot be traced: {type(error).__name__}: {said}"
            if swap.calls == 0 and not images:
                reason += " (before it came to the common attention interface)"
        raise UnsupportedModelError(
            f"{config.model_type} models are refused: {reason}",
            OPTIMUM + " LORA_EDGE_DEBUG=1 shows where it failed.",
        ) from error


def load_model(base: Base, attention: str | None, task: Task | None = None) -> Any:
    """The model in fp32 on the CPU, in evaluation mode.

    Args:
        base: the model's folder.
        attention: the registered attention function to trace it with; ``None`` for the model's own
            eager one.
        task: ``None`` for text generation.

    Raises:
        UnsupportedModelError: the architecture is refused.
        BaseModelError: transformers cannot load the model, or would make up some of its weights.
    """
    import transformers

    refuse_unloadable(base.config, seq2seq=task is not None and task.seq2seq)
    options: dict[str, Any] = {"attn_implementation": attention or "eager"}
    if task is not None:
        options["ignore_mismatched_sizes"] = True  # told of below, and allowed for the head alone
    with loading(base, task, attention):
        config = read_config(base, task)
        if attention is not None:
            refuse_untraceable(config.to_dict())
        refuse_experts(base, config, task)  # before any weight is loaded
        with quiet():
            model, found = getattr(transformers, _loader(task)).from_pretrained(
                base.directory,
                # A model keeps its config and writes into it, so this one must be its own.
                config=copy.deepcopy(config),
                dtype=torch.float32,
                output_loading_info=True,
                **options,
            )
    # transformers fills these in at random and only warns.
    random = sorted(found["missing_keys"]) + [str(x[0]) for x in found["mismatched_keys"]]
    if task is not None:
        random = task.complete(model, random)
    if random:
        raise BaseModelError(
            f"{base.name_or_path} lacks {len(random)} of its weights, or has them in another "
            f"shape: {', '.join(random[:3])}",
            "Download the whole checkpoint, or save it again with save_pretrained(); a head that "
            "an adapter brings may be missing, if it is named among the task's heads.",
        )
    refuse_loops(model, base.model_type, None)
    return model.eval()


@contextmanager
def loading(base: Base, task: Task | None, attention: str | None) -> Iterator[None]:
    """What transformers raises where it cannot load a model, as an error of ours.

    Args:
        base: the model.
        task: ``None`` for text generation.
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
        what = "a causal language model" if task is None else f"a model for {task.name}"
        raise BaseModelError(
            f"{base.name_or_path} cannot be loaded as {what}: {said}",
            f"Check that transformers' {_loader(task)} can load it.",
        ) from error


def read_config(base: Base, task: Task | None) -> Any:
    """transformers' config of a base, its head sized for the task."""
    import transformers

    labels = {} if task is None else task.labels
    return transformers.AutoConfig.from_pretrained(base.directory, **labels)


def empty_model(config: Any, task: Task | None) -> Any:
    """The model on the meta device; ``config`` is left as it is."""
    import transformers

    with torch.device("meta"):
        return getattr(transformers, _loader(task)).from_config(copy.deepcopy(config))


def refuse_experts(base: Base, config: Any, task: Task | None, model: Any = None) -> None:
    """Refuse a mixture of experts that cannot be captured.

    Args:
        base: the model.
        config: transformers' config of it.
        task: ``None`` for text generation.
        model: the model, if it is built already; its weights are not read.

    Raises:
        UnsupportedModelError: the field or module, the reason and the way out.
    """
    field = experts_field(config.to_dict())
    if field is None:
        return
    if task is not None:
        raise UnsupportedModelError(
            f"{base.model_type} models are refused for {task.name}: {field}: mixtures of "
            "experts are captured for text generation only",
            "Use a dense model for this task.",
        )
    refuse_loops(empty_model(config, task) if model is None else model, base.model_type, field)


def _loader(task: Task | None) -> str:
    return "AutoModelForCausalLM" if task is None else task.loader


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


def model_layers(model: nn.Module) -> dict[str, SiteEntry]:
    """Module path -> sizes and kind, of every layer that an adapter may change."""
    found = {path: _layer(module) for path, module in model.named_modules()}
    return {path: entry for path, entry in found.items() if entry is not None}


@contextmanager
def noted_activations(
    model: nn.Module, modules: dict[str, SiteEntry], images: int | None = None
) -> Iterator[None]:
    """Note the activations that layers work on in the block: how many dimensions they have.

    A layer whose activations do not begin with the batch of images (it works on windows of all of
    them) takes no branch, because a branch chooses by row; it is noted as refused.

    Args:
        model: the model.
        modules: module path -> layer; changed in place.
        images: how many images the pass is of; ``None`` for texts.
    """
    with ExitStack() as stack:
        for path, entry in list(modules.items()):
            least = 3 if entry.kind == "linear" else 2  # see swapped_linears

            def note(
                _: nn.Module, args: tuple[Any, ...], path: str = path, least: int = least
            ) -> None:
                if not args or not isinstance(args[0], Tensor):
                    return
                if modules[path].kind in ("norm", "linear"):
                    modules[path] = replace(modules[path], rank=max(args[0].ndim, least))
                if images is not None and images != int(args[0].shape[0]):
                    modules[path] = replace(modules[path], refusal=_NO_ROWS)

            module = model.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(note).remove)
        yield


_NO_ROWS = "works on windows of all images together, where a branch cannot tell them apart"


def tied_pair(model: Any) -> tuple[str, ...]:
    """Module paths of the embedding and of the output layer that shares its weight, or ()."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or embedding is None or head.weight is not embedding.weight:
        return ()
    return path_of(model, embedding), path_of(model, head)


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    """The module path of a module of a model."""
    found: str = next(path for path, module in model.named_modules() if module is wanted)
    return found


def _layer(module: Any) -> SiteEntry | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return None
    shape = tuple(int(size) for size in weight.shape)
    bias = getattr(module, "bias", None) is not None
    if is_linear(module):
        transposed = not isinstance(module, nn.Linear)  # Conv1D of GPT-2
        size_in, size_out = shape if transposed else shape[::-1]
        return SiteEntry(size_in, size_out, bias=bias, transposed=transposed)
    if isinstance(module, nn.Embedding):
        return SiteEntry(shape[0], shape[1], kind="embedding")
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        size = math.prod(shape[2:])
        return SiteEntry(
            module.in_channels * size,
            module.out_channels,
            kind="conv",
            bias=bias,
            refusal=_refused_convolution(module),
        )
    if weight.ndim == 1 and "Norm" in type(module).__name__:
        return SiteEntry(shape[0], shape[0], kind="norm", bias=bias)
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
