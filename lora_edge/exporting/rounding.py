"""Which layers of a base are rounded to few bits, and what is said of it.

Knows captures and passes; knows nothing of bundles or adapters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lora_edge.base.checkpoint import Base
from lora_edge.base.layer import Layer
from lora_edge.exporting.graphs import Progress, Weights
from lora_edge.maths.quantization import Quantization, Rounding, measured


def quantization_of(
    rounding: Rounding,
    base: Base,
    captured: Any,
    model: Any,
    modules: Mapping[str, Layer],
    weights: Weights,
    say: Progress,
) -> Quantization:
    """Which layers are rounded, and how; says the errors, and what stays as it is.

    Args:
        rounding: what is asked for.
        base: the base.
        captured: its :class:`~lora_edge.capture.BaseGraph`.
        model: the decoder's graph.
        modules: module path -> layer.
        weights: parameter path -> value.
        say: called with each line.
    """
    from lora_edge import graph as passes

    head = captured.head
    linear = passes.quantizable(model, {path: x for path, x in modules.items() if path != head})
    vocabulary: tuple[str, ...] = ()
    if rounding.head_bits is not None:
        vocabulary = passes.quantizable_vocabulary(
            model, modules, head, captured.tied, rounding.block_size
        )
        if head not in vocabulary:
            shared = f", and {captured.tied[0]}, whose weight it shares," if captured.tied else ""
            say(
                f"{head}{shared} stays in fp32: its weight has other readers, or an embedding's "
                f"width is no multiple of {rounding.block_size}"
            )
    found = measured(rounding, linear, vocabulary, weights, modules)
    others = "".join(f", {path} to {bits}" for path, bits in found.bits_of.items())
    say(
        f"rounding {len(found.layers)} layers, {_share(found, captured.tied, modules, base):.0%} "
        f"of the parameters, to {found.bits} bits{others}: ‖W - Q(W)‖ / ‖W‖ is "
        f"{found.mean_error:.3g} in the mean, {found.worst_error:.3g} at worst"
    )
    return found


def _share(
    quantization: Quantization, tied: Sequence[str], modules: Mapping[str, Layer], base: Base
) -> float:
    """The share of the base's parameters that is rounded."""
    twice = tied[1:] if set(tied) <= set(quantization.layers) else ()
    rounded = [modules[path] for path in quantization.layers if path not in twice]
    names = base.keys()
    whole = sum(math.prod(base.shape(name) or ()) for name in names)
    return sum(x.in_features * x.out_features for x in rounded) / whole
