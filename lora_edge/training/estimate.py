"""How much memory a run will need: counted where it can be, else scaled from one short pass."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from lora_edge.training.head import TargetHead, target_logits
from lora_edge.training.loop import Batches
from lora_edge.training.settings import Settings
from lora_edge.training.tokens import PackedExample, Tokenized, TokenizedExample

_PROBE_TOKENS = 128
_MAPPED = 32 << 20  # bytes: glibc gives blocks from this size on back at once (mallopt(3))
_PER_TRAINED = 16  # bytes: float32 weight, gradient, and AdamW's two moments


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step holds at its peak.

    Attributes:
        base: the frozen base.
        trained: weights, gradients and optimizer state of what is trained.
        activations: what one forward pass keeps for its backward pass, at the largest batch.
        gaps: what the C library's allocator keeps between batches of other lengths, at worst; 0
            where it is not glibc's, or on CUDA, whose context comes on top.
        process: Python, the libraries, tokenizer and data as they are loaded now; 0 on CUDA.
    """

    base: int
    trained: int
    activations: int
    gaps: int
    process: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.trained + self.activations + self.gaps + self.process


def estimate(
    model: Any,
    examples: Sequence[Tokenized],
    settings: Settings,
    batches: Batches,
    head: TargetHead | None,
) -> Memory:
    """Estimate a run's memory from the model and one short forward pass.

    Args:
        model: PEFT's wrapper around the base.
        examples: what is trained on.
        settings: how.
        batches: makes batches of examples.
        head: computes the output head on targets only.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    unique = {p.data_ptr(): p.numel() * p.element_size() for p in frozen}
    longest = max(examples, key=_size)
    probe = _shortened(longest)
    batch = batches([probe])
    kept = _kept_bytes(model, batch, head, settings)
    activations = sum(kept)
    if settings.gradient_checkpointing:
        activations = _recomputed(model, batch, head, settings, activations)
    scale = settings.batch_size * _size(longest) / _size(probe)
    base = sum(unique.values())
    gaps = process = 0
    if next(model.parameters()).device.type == "cpu":
        process = max(0, _resident() - base - 4 * trained)
        if platform.libc_ver()[0] == "glibc":
            small = sum(size for size in kept if scale * size < _MAPPED)
            gaps = round(scale * min(small, activations))
    return Memory(base, _PER_TRAINED * trained, round(scale * activations), gaps, process)


def _resident() -> int:
    """Bytes of this process in memory; 0 where /proc does not tell."""
    file = Path("/proc/self/statm")
    if not file.is_file():
        return 0
    return int(file.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _size(example: Tokenized) -> int:
    return len(getattr(example, "input_ids", (0,)))


def _shortened(example: Tokenized) -> Tokenized:
    """The end of a long example, with its share of targets; a classifier's as it is."""
    if isinstance(example, PackedExample):
        example = max(example.parts, key=_size)
    if isinstance(example, TokenizedExample) and _size(example) > _PROBE_TOKENS:
        step = _size(example) / _PROBE_TOKENS
        picked = [int(index * step) for index in range(_PROBE_TOKENS)]
        ids, labels = example.input_ids, example.labels
        return TokenizedExample(
            tuple(ids[i] for i in picked), tuple(labels[i] for i in picked), example.cut
        )
    return example


def _recomputed(
    model: Any,
    batch: dict[str, torch.Tensor],
    head: TargetHead | None,
    settings: Settings,
    whole: int,
) -> int:
    """Bytes kept where layers are computed again in the backward pass.

    That is what layers are given, what one of them keeps while it is computed again, and what is
    kept outside of layers.

    Args:
        model, batch, head, settings: as :func:`_kept_bytes` has them.
        whole: bytes kept without computing anything again.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [x for x in model.modules() if isinstance(x, GradientCheckpointingLayer)]
    given = 0

    def count(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal given
        given += (args[0] if args else kwargs["hidden_states"]).nbytes

    with ExitStack() as stack:
        for layer in layers:
            hook = layer.register_forward_pre_hook(count, with_kwargs=True)
            stack.callback(hook.remove)
        # transformers 5 has a new name for it.
        kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        stack.callback(getattr(model, f"{kind}_checkpointing_disable"))
        outside = sum(_kept_bytes(model, batch, head, settings))
    return outside + given + (whole - outside) // max(len(layers), 1)


def _kept_bytes(
    model: Any, batch: dict[str, torch.Tensor], head: TargetHead | None, settings: Settings
) -> Collection[int]:
    """Bytes of each distinct tensor that autograd saves, the model's own parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "tokens"}
    labels = inputs.pop("labels")
    was = model.training
    model.train()
    state = torch.get_rng_state()  # dropout; the run's own numbers must not depend on this
    half = settings.precision != "fp32"
    dtype = torch.float16 if settings.precision == "fp16" else torch.bfloat16
    try:
        with (
            torch.autocast(device.type, dtype=dtype, enabled=half),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            if labels.ndim == 1:
                logits, targets = model(**inputs).logits, labels
            else:
                logits, targets = target_logits(model, inputs, labels, head)
            loss = cross_entropy(logits.float(), targets)
    finally:
        torch.set_rng_state(state)
        model.train(was)
    del loss
    return saved.values()
