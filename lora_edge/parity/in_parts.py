"""How a large model is checked in little memory: graphs in parts, on mapped weights.

PyTorch reads its weights where the checkpoint is mapped, a layer at a time
(:mod:`lora_edge.parity.by_layer`); with graphs in parts, neither side has the model in memory.
A graph of few bits is small beside its base, and runs whole. There it is the time that is long:
each row decodes all codes again.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

from lora_edge.base.checkpoint import Base
from lora_edge.bundle.bundle import Bundle
from lora_edge.maths.quantization import Quantization
from lora_edge.parity.plan.plan import Depth
from lora_edge.parity.reference import Reference
from lora_edge.runtime import Runner
from lora_edge.runtime.opening import open_parts
from lora_edge.runtime.segmented import Cut
from lora_edge.runtime.session import ModelSession

VERY_LARGE = 5_000_000_000
"""Numbers of a base from which on the proof of few bits may take fewer prompts."""

_BYTES = 128 << 20  # of the weights of a part


def cut_of(reference: Reference, quantization: Quantization | None = None) -> Cut | None:
    """How a model's graphs are cut; ``None``: it is small, or of few bits, and they run whole."""
    if not reference.large or quantization is not None:
        return None
    from lora_edge.graph.segments import segments  # needs onnx, which goldens do without

    return partial(segments, limit=_BYTES)


def fewer_prompts(base: Base, quantization: Quantization | None, depth: Depth) -> str:
    """Why a proof in little memory takes the prompts of ``quick``; empty: it does not.

    Args:
        base: the base.
        quantization: of the bundle.
        depth: what was asked for; ``full`` is whole, whatever it takes.
    """
    few = quantization is not None and not quantization.half
    if not few or depth != "normal" or base.size <= VERY_LARGE:
        return ""
    return (
        f"Fewer prompts than usual, those of --quick, because of --low-memory and "
        f"{base.size / 1e9:.1f} billion numbers"
    )


class RunnerInParts(Runner):
    """A Runner whose session has the graphs in parts, on the CPU.

    Args:
        bundle: the bundle.
        cut: how they are cut.
        options: a Runner's.
    """

    def __init__(self, bundle: Bundle, cut: Cut, **options: Any) -> None:
        self._cut = cut
        super().__init__(bundle, session_cache=False, **options)

    @cached_property
    def session(self) -> ModelSession:
        """The session on the bundle's own graphs, each in parts."""
        return open_parts(self.bundle, {**self._options, "cut": self._cut}, exact=self._exact)
