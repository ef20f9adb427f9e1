"""Which layers of a base are rounded to few bits, and what is said of it.

Knows captures and passes; knows nothing of bundles or adapters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lora_edge.base.checkpoint import Base
from lora_edge.base.layer import Layer
from lora_edge.errors import UnsupportedModelError
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
        model: its graph.
        modules: module path -> layer, of those that may be rounded.
        weights: parameter path -> value.
        say: called with each line.

    Raises:
        UnsupportedModelError: no layer can be rounded.
    """
    from lora_edge import graph as passes

    head = captured.head
    linear = passes.quantizable(model, {path: x for path, x in modules.items() if path != head})
    vocabulary: tuple[str, ...] = ()
    if rounding.head_bits is not None:
        vocabulary, left = _vocabulary(captured, model, modules, rounding.block_size)
        if left:
            say(
                f"{left} stays in fp32: its weight has other readers, or an embedding's width is "
                f"no multiple of {rounding.block_size}"
            )
    if not linear and not vocabulary:
        raise UnsupportedModelError(
            f"{base.name_or_path} has no linear layer and no token embedding that can be rounded: "
            "convolutions and heads of labels stay in fp32",
            "Use --precision fp32.",
        )
    found = measured(rounding, linear, vocabulary, weights, modules)
    others = "".join(f", {path} to {bits}" for path, bits in found.bits_of.items())
    say(
        f"rounding {len(found.layers)} layers, {_share(found, captured.tied, modules, base):.0%} "
        f"of the parameters, to {found.bits} bits{others}: ‖W - Q(W)‖ / ‖W‖ is "
        f"{found.mean_error:.3g} in the mean, {found.worst_error:.3g} at worst"
    )
    return found


def _vocabulary(
    captured: Any, model: Any, modules: Mapping[str, Layer], block_size: int
) -> tuple[tuple[str, ...], str]:
    """The token embedding and the layer of a vocabulary's logits, those that can be rounded; and,
    for people, what cannot."""
    from lora_edge import graph as passes

    part, tied = captured.gives, captured.tied
    if part.head:
        found = passes.quantizable_vocabulary(model, modules, part.head, tied, block_size)
        shared = f", and {tied[0]}, whose weight it shares," if tied else ""
        return found, "" if part.head in found else f"{part.head}{shared}"
    # A head of labels stays as it is: adapters bring their own.
    tokens = {
        path: x
        for path, x in modules.items()
        if x.kind == "embedding" and x.in_features == part.vocab_size
    }
    found = passes.quantizable_embeddings(model, tokens, block_size)
    return found, ", ".join(path for path in tokens if path not in found)


def _share(
    quantization: Quantization, tied: Sequence[str], modules: Mapping[str, Layer], base: Base
) -> float:
    """The share of the base's parameters that is rounded."""
    twice = tied[1:] if set(tied) <= set(quantization.layers) else ()
    rounded = [modules[path] for path in quantization.layers if path not in twice]
    names = base.keys()
    whole = sum(math.prod(base.shape(name) or ()) for name in names)
    return sum(x.in_features * x.out_features for x in rounded) / whole
