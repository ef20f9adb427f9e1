"""What a model says of itself while it is traced: refusals, and what its layers work on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lora_edge.base.families import OPTIMUM
from lora_edge.base.layer import Layer
from lora_edge.capture.attention import RegisteredAttention
from lora_edge.errors import UnsupportedModelError

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


@contextmanager
def noted_activations(
    model: nn.Module, modules: dict[str, Layer], images: int | None = None
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
