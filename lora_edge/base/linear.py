"""Which modules are linear layers."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: ``nn.Linear``, or GPT-2's ``Conv1D``.

    A subclass that computes something else (Phi-3.5-MoE's router) is none, nor is the output
    projection of an ``nn.MultiheadAttention``: only its weight is read.
    """
    if isinstance(module, nn.Linear):
        plain = type(module).forward is nn.Linear.forward
        return plain and not isinstance(module, NonDynamicallyQuantizableLinear)
    return type(module).__name__ == "Conv1D"
