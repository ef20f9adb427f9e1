"""A layer of PEFT's without its adapter, its change in the weight itself, rounded.

Whoever rounds W + ΔW needs its numbers, and PEFT gives outputs. So W + ΔW is computed in numpy, and
PEFT's own unmerged forward says, in float64, whether it is what the layer does.
One of the few files of this package that import torch, transformers or peft.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_edge.errors import ParityError
from lora_edge.fit.changes import ParameterChange

_INPUTS = 4  # random ones of a linear layer
_ROWS = 4096  # of an embedding that are looked up
_SAME = 1e-6  # of the effect: both sides are float64
_UNIT = 1e-12  # of the outputs


def merged_first(
    model: Any,
    path: str,
    change: ParameterChange | None,
    *,
    copied: bool,
) -> tuple[Any, NDArray[np.float32]]:
    """Put the base's own layer in the place of PEFT's, and say what the adapter makes of it.

    Args:
        model: transformers' model, inside PEFT's.
        path: of the layer in it.
        change: what the adapter makes of its weight; ``None``: nothing.
        copied: give the layer a copy of its weight, which may be written to.

    Returns:
        The layer, its weight a parameter that no other layer has, with the checkpoint's values; and
        the values that it is to have before they are rounded, ``[out, in]`` float32.

    Raises:
        ParityError: PEFT's layer does something else than W + ΔW.
    """
    layer = model.get_submodule(path)
    plain = _own(layer)
    own = plain.weight.detach()
    plain.weight = nn.Parameter(own.clone() if copied else own, requires_grad=False)
    matrix = plain.weight.detach().T if is_turned(plain) else plain.weight.detach()
    values = matrix.float().numpy()
    if change is not None:
        changed = change(values.astype(np.float64))
        _check(path, layer, plain, changed)
        values = changed.astype(np.float32)
    if plain is not layer:
        if not isinstance(plain, nn.Embedding):
            bias = _apply(layer, torch.zeros(1, matrix.shape[1], dtype=torch.float64))[0]
            if plain.bias is not None or bool(bias.any()):
                plain.bias = nn.Parameter(bias.float(), requires_grad=False)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, plain)
    return plain, values


def sharing(model: Any, path: str) -> list[Any]:
    """The embeddings of a model, beside one of that path, that read its very weight."""
    own = model.get_submodule(path)
    return [
        module
        for module in model.modules()
        if isinstance(own, nn.Embedding)
        and isinstance(module, nn.Embedding)
        and module is not own
        and module.weight is own.weight
    ]


def is_turned(layer: Any) -> bool:
    """Whether a layer keeps its weight as ``[in, out]``, as Conv1D does."""
    return not isinstance(layer, nn.Linear | nn.Embedding)


def _own(layer: Any) -> Any:
    """The base's layer, inside whatever PEFT has put around it."""
    while True:
        inner = getattr(layer, "original_module", None) or getattr(layer, "base_layer", None)
        if inner is None:
            return layer
        layer = inner


def _check(path: str, layer: Any, plain: Any, changed: NDArray[np.float64]) -> None:
    """Compare PEFT's unmerged forward with that of a weight, on a few inputs, in float64."""
    weight = torch.from_numpy(np.ascontiguousarray(changed))
    before = plain.weight.detach().double()
    after = (weight.T if is_turned(plain) else weight).contiguous()
    if isinstance(plain, nn.Embedding):
        odd = (after != before).any(1).nonzero().flatten()
        inputs = torch.cat([torch.arange(min(len(before), _INPUTS)), odd[:_ROWS]])
    else:
        random = np.random.default_rng(0)
        inputs = torch.from_numpy(random.standard_normal((_INPUTS, changed.shape[1])))
    wanted = _apply(layer, inputs)
    own, theirs = (_apply(_with_weight(plain, x), inputs) for x in (before, after))
    if not isinstance(plain, nn.Embedding):  # a trained bias is taken from PEFT as it is
        zero = torch.zeros_like(inputs[:1])
        wanted = wanted - _apply(layer, zero)
        nothing = _apply(_with_weight(plain, before), zero)
        own, theirs = own - nothing, theirs - nothing
    off, effect = (wanted - theirs).norm(), (wanted - own).norm()
    if not off <= _SAME * effect + _UNIT * wanted.norm():
        raise ParityError(
            f"PEFT's {path} is not W + ΔW as it is merged: outputs differ by {off / effect:.1e} of "
            "the adapter's effect",
            "Nothing is proved. Export with --keep-high touched, or --mode switchable.",
        )


def _with_weight(plain: Any, weight: Tensor) -> Any:
    found = copy.copy(plain)
    found._parameters = dict(plain._parameters)
    found.weight = nn.Parameter(weight, requires_grad=False)
    return found


def _apply(layer: Any, inputs: Tensor) -> Tensor:
    """What a layer gives in float64; it stays as it is."""
    wide = copy.deepcopy(layer).double()
    with torch.no_grad():
        found: Tensor = wide(inputs)
    return found
