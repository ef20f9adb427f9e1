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
    models: Mapping[str, Any],
    modules: Mapping[str, Layer],
    weights: Weights,
    say: Progress,
) -> Quantization:
    """Which layers are rounded, and how; says the errors, and what stays as it is.

    Args:
        rounding: what is asked for.
        base: the base.
        captured: its :class:`~lora_edge.capture.BaseGraph`.
        models: part -> its graph; a foreign one's layers get the names of our own captures.
        modules: module path -> layer, of those that may be rounded.
        weights: parameter path -> value.
        say: called with each line.

    Raises:
        GraphError: a layer of a foreign graph cannot be found.
        UnsupportedModelError: no layer can be rounded.
    """
    from lora_edge import graph as passes

    for name, part in captured.parts.items():
        if part.form == "foreign":
            named = {x: y for x, y in modules.items() if captured.part_of(x) == name}
            named = {path: x for path, x in named.items() if x.kind == "linear"}
            passes.name_layers(models[name], named, captured.tied, weights)
    head = captured.head
    bodies = {path: x for path, x in modules.items() if path != head}
    linear = [path for model in models.values() for path in passes.quantizable(model, bodies)]
    vocabulary: tuple[str, ...] = ()
    if rounding.head_bits is not None:
        vocabulary, left = _vocabulary(captured, models, modules, rounding.block_size)
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
    captured: Any, models: Mapping[str, Any], modules: Mapping[str, Layer], block_size: int
) -> tuple[tuple[str, ...], str]:
    """The token embedding and the layer of a vocabulary's logits, those that can be rounded; and,
    for people, what cannot. An embedding that two graphs read is codes in both or in none."""
    from lora_edge import graph as passes

    part, tied = captured.gives, captured.tied
    tokens = {
        path: x
        for path, x in modules.items()
        if x.kind == "embedding" and x.in_features == captured.reads.vocab_size
    }
    able = {
        name: passes.quantizable_embeddings(model, tokens, block_size)
        for name, model in models.items()
    }
    if part.head:
        last = list(models)[-1]
        able[last] = passes.quantizable_vocabulary(
            models[last], modules, part.head, tied, block_size
        )
    unable = {
        path
        for name, model in models.items()
        for path in passes.present(model, modules, tokens)
        if path not in able[name]
    }
    if unable & set(tied):
        unable |= set(tied)
    found = dict.fromkeys(path for paths in reversed(able.values()) for path in paths)
    left = sorted(unable - set(tied))
    if part.head and (part.head not in found or part.head in unable):
        shared = f", and {tied[0]}, whose weight it shares," if tied else ""
        left.append(f"{part.head}{shared}")
    return tuple(path for path in found if path not in unable), ", ".join(left)


def _share(
    quantization: Quantization, tied: Sequence[str], modules: Mapping[str, Layer], base: Base
) -> float:
    """The share of the base's parameters that is rounded."""
    twice = tied[1:] if set(tied) <= set(quantization.layers) else ()
    rounded = [modules[path] for path in quantization.layers if path not in twice]
    names = base.keys()
    whole = sum(math.prod(base.shape(name) or ()) for name in names)
    return sum(x.in_features * x.out_features for x in rounded) / whole
