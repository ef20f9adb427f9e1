"""What the hardware can do, asked before anything is loaded; what to do when memory runs out."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import torch

from lora_edge.errors import AdapterError, MissingDependencyError, OutOfMemoryError
from lora_edge.training.settings import Settings
from lora_edge.training.sharding import check_launch

_NO_MEMORY = ("can't allocate memory", "out of memory", "Cannot allocate memory")


def choose_device(settings: Settings) -> str:
    """``cpu`` or ``cuda``, and that it can do what the settings ask.

    Raises:
        AdapterError: no CUDA device; a precision that the hardware does not have; a 4-bit base off
            CUDA; a way of sharding that the adapter cannot be saved from.
        MissingDependencyError: a 4-bit base without bitsandbytes.
    """
    check_launch(settings)
    cuda = torch.cuda.is_available()
    device = ("cuda" if cuda else "cpu") if settings.device == "auto" else settings.device
    if device == "cuda" and not cuda:
        raise AdapterError(
            "device is cuda, and this PyTorch sees no CUDA device",
            "Use --device cpu, or install a PyTorch built for CUDA and its driver.",
        )
    if settings.base_format == "4bit":
        if device != "cuda":
            raise AdapterError(
                "base_format is 4bit (QLoRA) on the CPU: bitsandbytes' 4-bit kernels for training "
                "are CUDA's",
                "Use --base-format bf16, which halves the base's memory on any device.",
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MissingDependencyError(
                "a 4-bit base needs bitsandbytes", "Install it: pip install 'lora-edge[qlora]'."
            )
    if settings.precision == "fp16" and device == "cpu":
        raise AdapterError(
            "precision is fp16, which PyTorch does not train in on a CPU",
            "Use --precision fp32; or bf16 where the CPU has AVX512-BF16 or AMX.",
        )
    if settings.precision == "bf16" and not _has_bf16(device):
        raise AdapterError(
            f"precision is bf16, and this {device} has no bf16 arithmetic, so it would be slower",
            "Use --precision fp32" + ("." if device == "cpu" else " or fp16."),
        )
    return device


def process() -> int:
    """Rank of this process among those of ``torchrun`` or ``accelerate launch``; 0 alone."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def memory_errors(settings: Settings) -> Iterator[None]:
    """Turns PyTorch's messages on memory into one that says what to lower.

    Raises:
        OutOfMemoryError: the block ran out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(x in str(error) for x in _NO_MEMORY):
            raise
        raise OutOfMemoryError(
            f"out of memory with batch_size {settings.batch_size} and "
            f"base_format {settings.base_format}",
            "; ".join(_remedies(settings)) + ".",
        ) from error


def _remedies(settings: Settings) -> Iterator[str]:
    if settings.batch_size > 1:
        yield (
            f"Lower --batch-size to {settings.batch_size // 2} and raise --accumulate to "
            f"{settings.accumulate * 2}: the same steps in less memory"
        )
    if not settings.gradient_checkpointing:
        yield "give --gradient-checkpointing"
    if settings.base_format == "fp32":
        yield "give --base-format bf16"
    yield "lower --max-length; --dry-run estimates what a run needs"


def _has_bf16(device: str) -> bool:
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)
