"""Merged, then rounded: what of an adapter is left, which layers get more bits, what is refused.

Knows weights and what PyTorch says of them; knows nothing of graphs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lora_edge.base.layer import Layer
from lora_edge.errors import ParityError
from lora_edge.exporting.graphs import Progress, Weights
from lora_edge.fit.changes import ParameterChange
from lora_edge.maths.quantization import Quantization, with_errors
from lora_edge.maths.survival import Effect, KeepHigh, LayerSurvival, Survival

_FLOATS = 32
_EIGHT = 8


@dataclasses.dataclass(frozen=True)
class Merging:
    """A merge whose result is rounded.

    Attributes:
        changes: parameter path -> what the adapter makes of it.
        modules: module path -> layer.
        tied: module paths of the embedding and of the output layer that shares its weight, or ().
        weights: the base's parameters, not rounded.
    """

    changes: Mapping[str, ParameterChange]
    modules: Mapping[str, Layer]
    tied: tuple[str, ...]
    weights: Weights

    def groups(self, quantization: Quantization) -> list[tuple[str, ...]]:
        """The rounded layers that the adapter changes; two that share a weight are one group."""
        tied = self.tied if set(self.tied) <= set(quantization.layers) else ()
        touched = [path for path in quantization.layers if f"{path}.weight" in self.changes]
        own = [(path,) for path in touched if path not in tied]
        return [*own, *([tied] if set(tied) & set(touched) else [])]

    def measured(self, quantization: Quantization) -> dict[str, LayerSurvival]:
        """What the codes of each layer keep of its change."""
        found = {}
        for path in quantization.layers:
            change = self.changes.get(f"{path}.weight")
            if change is None:
                continue
            weight = self._matrix(path)
            changed = change(weight.astype(np.float64)).astype(np.float32)
            before, after = (quantization.blocks(path, x) for x in (weight, changed))
            layer = LayerSurvival.of(before, after, weight, changed)
            if layer is not None:
                found[path] = layer
        return found

    def _matrix(self, path: str) -> NDArray[np.floating]:
        """A weight, ``[out, in]``, an embedding's ``[vocab, hidden]``."""
        others = self.tied if path in self.tied else ()
        found = (self.weights(f"{x}.weight") for x in (path, *others))
        weight = next(x for x in found if x is not None)
        return weight.T if self.modules[path].transposed else weight


def rounded_after_merge(
    quantization: Quantization,
    merging: Merging,
    effect: Callable[[Quantization], Effect],
    keep_high: KeepHigh,
    floor: float,
    who: str,
    say: Progress,
) -> tuple[Quantization, Survival]:
    """How the merged weights are rounded, and what is left of the adapter.

    Args:
        quantization: how the base's would be.
        merging: the merge.
        effect: what a way of rounding leaves of the adapter's effect.
        keep_high: ``none``, or ``auto``: as few layers as need be get 8 bits, and then floats,
            first those whose change is realised worst.
        floor: least :attr:`Effect.retained` that is allowed.
        who: the adapter's name.
        say: called with what was measured.

    Raises:
        ParityError: less is left than is allowed.
    """
    plain = dataclasses.replace(quantization, merged_first=True)
    layers = merging.measured(plain)
    made, found = plain, effect(plain)
    high: dict[str, int] = {}
    if keep_high == "auto" and found.retained < floor:
        made, found, high = _raised(plain, merging, layers, effect, floor)
        made = with_errors(made, merging.weights, merging.modules)
        layers = merging.measured(made)
    survival = Survival(keep_high, floor, found, layers, high)
    say(f"merged, then rounded: {survival.line()}")
    if found.retained < floor:
        raise ParityError(
            f"adapter {who}: merged and rounded to {quantization.bits} bits, {found.retained:.1%} "
            f"of its effect is retained (gain {found.gain:.3f}, cosine {found.cosine:.3f}), and "
            f"{floor:.1%} is the least",
            "Nothing was published. "
            + (
                "Export with --mode switchable, or with a higher --precision."
                if keep_high == "auto" or quantization.half
                else "Export with --keep-high auto, which keeps layers at 8 bits or in fp32, or "
                "with --mode switchable."
            ),
        )
    return made, survival


def _raised(
    plain: Quantization,
    merging: Merging,
    layers: Mapping[str, LayerSurvival],
    effect: Callable[[Quantization], Effect],
    floor: float,
) -> tuple[Quantization, Effect, dict[str, int]]:
    """The fewest layers, the worst first, at 8 bits; where all are too few, the fewest in floats.

    Each count is found by halving, and what is returned was measured.
    """

    def worst(group: Sequence[str]) -> float:
        return min((layers[path].cosine for path in group if path in layers), default=1.0)

    groups = sorted(merging.groups(plain), key=worst)
    low = [group for group in groups if plain.bits_at(group[0]) < _EIGHT]

    def at(eight: int, floats: int) -> tuple[Quantization, Effect, dict[str, int]]:
        high = {path: _EIGHT for group in low[:eight] for path in group}
        high |= {path: _FLOATS for group in groups[:floats] for path in group}
        bits = {path: bits for path, bits in high.items() if bits != _FLOATS}
        bits = {
            path: x for path, x in {**plain.bits_of, **bits}.items() if high.get(path) != _FLOATS
        }
        kept = tuple(path for path in plain.layers if high.get(path) != _FLOATS)
        made = dataclasses.replace(plain, layers=kept, bits_of=bits)
        return made, effect(made), high

    found = _fewest(len(low), lambda count: at(count, 0), floor)
    if found[1].retained < floor:
        found = _fewest(len(groups), lambda count: at(len(low), count), floor)
    return found


_Found = tuple[Quantization, Effect, dict[str, int]]


def _fewest(most: int, at: Callable[[int], _Found], floor: float) -> _Found:
    """What the least count gives that reaches the floor; where none does, what the most gives."""
    best = at(most)
    low, high = 0, most
    while best[1].retained >= floor and high - low > 1:
        middle = (low + high) // 2
        found = at(middle)
        if found[1].retained >= floor:
            best, high = found, middle
        else:
            low = middle
    return best
