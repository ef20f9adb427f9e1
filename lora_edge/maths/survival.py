"""What is left of an adapter's change when the changed weights are rounded to codes.

Plain numpy; knows nothing of graphs, adapters or PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from lora_edge.files.schema import FINITE, between
from lora_edge.maths.quantization import Blocks

KeepHigh = Literal["touched", "none", "auto"]
MIN_EFFECT = 0.9

_Share = Annotated[float, between(0, 1)]
_Finite = Annotated[float, FINITE]


@dataclass(frozen=True)
class LayerSurvival:
    """What one layer keeps of its change ΔW, when W + ΔW is rounded.

    Attributes:
        codes: share of the codes of Q(W + ΔW) that are not those of Q(W).
        cosine: of the realised change Q(W + ΔW) − Q(W) with ΔW; 0 where nothing is realised.
        error: ‖Q(W + ΔW) − Q(W) − ΔW‖ / ‖ΔW‖.
    """

    codes: _Share
    cosine: Annotated[float, between(-1, 1)]
    error: _Finite

    @classmethod
    def of(
        cls,
        before: Blocks,
        after: Blocks,
        weight: NDArray[np.floating],
        changed: NDArray[np.floating],
    ) -> LayerSurvival | None:
        """Measure a layer; ``None`` where its weight does not change at all.

        Args:
            before: the codes of ``weight``.
            after: the codes of ``changed``, as many.
            weight: W, ``[out, in]``.
            changed: W + ΔW, ``[out, in]``.
        """
        intended = changed.astype(np.float64) - weight
        size = float(np.linalg.norm(intended))
        if not size:
            return None
        realised = after.weight().astype(np.float64) - before.weight()
        length = float(np.linalg.norm(realised))
        dot = float(np.sum(realised * intended))
        odd = (before.codes != after.codes).reshape(len(weight), -1)[:, : before.in_features]
        return cls(
            codes=float(odd.mean()),
            cosine=max(-1.0, min(1.0, dot / (length * size))) if length else 0.0,
            error=float(np.linalg.norm(realised - intended)) / size,
        )


@dataclass(frozen=True)
class Effect:
    """How much of an intended change of outputs e is in a realised one r.

    Attributes:
        gain: <r, e> / <e, e>: the share of the intended change that is there (1: all).
        cosine: <r, e> / (‖r‖ ‖e‖): how far what is there is nothing else (1: it is).
        error: ‖r − e‖ / ‖e‖.
    """

    gain: _Finite
    cosine: Annotated[float, between(-1, 1)]
    error: _Finite

    @property
    def retained(self) -> float:
        """The least of the gain, what the gain is above 1 counted as missing, and the cosine."""
        return min(1 - abs(1 - self.gain), self.cosine)


def effect(
    realised: Sequence[NDArray[np.floating]], intended: Sequence[NDArray[np.floating]]
) -> Effect | None:
    """Compare changes of outputs, over all rows at once; ``None`` where none is intended.

    Args:
        realised: of each row.
        intended: of each row, of the same shapes.
    """
    dot = there = wanted = off = 0.0
    for own, theirs in zip(realised, intended, strict=True):
        r, e = own.astype(np.float64), theirs.astype(np.float64)
        dot += float(np.sum(r * e))
        there += float(np.sum(r * r))
        wanted += float(np.sum(e * e))
        off += float(np.sum((r - e) ** 2))
    if not wanted:
        return None
    cosine = dot / math.sqrt(there * wanted) if there else 0.0
    return Effect(dot / wanted, max(-1.0, min(1.0, cosine)), math.sqrt(off / wanted))


@dataclass(frozen=True)
class Survival:
    """What is left of a merged adapter in weights that were rounded after the merge.

    Attributes:
        keep_high: what decided which of its layers have more bits.
        floor: least :attr:`Effect.retained` that was allowed.
        effect: on logits: Q(W + ΔW) against Q(W), beside W + ΔW against W.
        layers: module path -> what its codes keep, of the layers that the adapter changes.
        high: module path -> bits, of those of them that have more than they would have had without
            ``auto``; 32: they are floats.
    """

    keep_high: KeepHigh
    floor: _Share
    effect: Effect
    layers: Mapping[str, LayerSurvival] = field(default_factory=dict)
    high: Mapping[str, Annotated[int, between(8, 32)]] = field(default_factory=dict)

    def line(self) -> str:
        """What was measured, in one line."""
        own = self.effect
        said = (
            f"{own.retained:.1%} of the adapter's effect is retained (gain {own.gain:.3f}, cosine "
            f"{own.cosine:.3f}, error {own.error:.3f})"
        )
        if self.layers:
            found = self.layers.values()
            codes = sum(x.codes for x in found) / len(self.layers)
            cosine = sum(x.cosine for x in found) / len(self.layers)
            worst = min(x.cosine for x in found)
            said += (
                f"; in {len(self.layers)} rounded layers {codes:.1%} of the codes change, cosine "
                f"of the realised change with ΔW {cosine:.3f} in the mean, {worst:.3f} at worst"
            )
        eight = sum(bits == 8 for bits in self.high.values())
        if self.high:
            said += f"; kept higher: {eight} layers at 8 bits, {len(self.high) - eight} in fp32"
        return said
