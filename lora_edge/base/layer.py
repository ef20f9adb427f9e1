"""A layer of a base model, as an adapter sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from lora_edge.files.schema import between

SiteKind = Literal["linear", "embedding", "conv", "norm", "head"]


_Size = Annotated[int, between(0, 1 << 31)]


@dataclass(frozen=True)
class Layer:
    """A layer of the model that an adapter may change.

    Attributes:
        in_features: size of the input's last dimension; of an embedding the vocabulary, of a
            convolution all channels times the kernel's size.
        out_features: size of the output's last dimension (a convolution's channels).
        kind: ``linear``, ``embedding``, ``conv``, ``norm``, or ``head``: a linear layer whose
            outputs are a task's labels, and which adapters replace.
        bias: the base has a bias there.
        rank: number of dimensions of the activations that a norm or a linear layer works on.
        transposed: the checkpoint keeps the weight of this linear layer as ``[in, out]``.
        refusal: why PEFT's low-rank pair there is refused; empty where it is not.
    """

    in_features: _Size
    out_features: _Size
    kind: SiteKind = "linear"
    bias: bool = False
    rank: Annotated[int, between(0, 16)] = 3
    transposed: bool = False
    refusal: str = ""
