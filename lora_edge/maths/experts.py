"""LoRA on stacked parameters (PEFT's ``target_parameters``): whose tensors they are, and the maths.

PEFT wraps a module once for each targeted parameter, one wrapper around the other, so the tensors
say only how deep their wrapper lies: ``….experts.lora_A.weight`` is the outermost, each further
``.base_layer`` one deeper. Wrappers are made in the order in which the module registered its
parameters, whatever the order in ``target_parameters`` (``BaseTuner._inject_parameters``,
peft 0.17 to 0.21), so the deepest belongs to the first of them.

For a parameter ``[E, m, n]``, ``A`` is ``[E·r, in]``, its rows ordered by expert, then rank, and
``B`` is ``[out, r·E]``, its columns ordered by rank, then expert (``ParamWrapper``). Which axis is
"in" differs:

* before peft 0.19: ``in = m``, ``out = n``;
* peft 0.19.0: so, but exchanged where the module says ``is_transposed``;
* from 0.19.1: ``in = n``, ``out = m``, but exchanged where the module says ``is_transposed``.

The tensors' shapes show it, but for a square parameter, where the version must say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from lora_edge.errors import AdapterError, UnsupportedAdapterError

_LEVEL = ".base_layer"
_RELEASE = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?(?P<rest>.*)")
_AGAIN = "Save the adapter again with the PEFT release that trained it, or train it again."


@dataclass(frozen=True)
class ParameterModule:
    """A module whose parameters PEFT can target directly.

    Attributes:
        parameters: name in the module -> shape, in the order of registration.
        transposed: the module's ``is_transposed``: 3-D parameters are ``[E, in, out]``.
    """

    parameters: Mapping[str, tuple[int, ...]]
    transposed: bool


@dataclass(frozen=True)
class ExpertLora:
    """A low-rank change of one stacked parameter.

    Attributes:
        path: parameter path, e.g. ``model.layers.0.mlp.experts.gate_up_proj``.
        shape: the parameter's, ``[E, m, n]`` or ``[m, n]``.
        a: PEFT's ``[E·r, in]``.
        b: PEFT's ``[out, r·E]``.
        scaling: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
        exchanged: ``in`` is the parameter's last axis, else the one before it.
    """

    path: str
    shape: tuple[int, ...]
    a: NDArray[np.float32]
    b: NDArray[np.float32]
    scaling: float
    exchanged: bool

    @property
    def rank(self) -> int:
        """r, of each expert."""
        return int(self.a.shape[0]) // _experts(self.shape)

    def delta(self, expert: int) -> NDArray[np.float64]:
        """``[m, n]``: what one expert's matrix is changed by, in the parameter's own layout."""
        count = _experts(self.shape)
        a = self.a.reshape(count, self.rank, -1)[expert].astype(np.float64)  # [r, in]
        b = self.b.reshape(-1, self.rank, count)[:, :, expert].astype(np.float64)  # [out, r]
        product: NDArray[np.float64] = self.scaling * (b @ a)
        return product if self.exchanged else product.T


# What the layers of one expert are called, and where transformers 5 keeps them.
_OF_ONE_EXPERT = re.compile(
    r"(?P<block>.+)\.(?:block_sparse_moe|mlp)\.experts\.(?P<expert>\d+)\."
    r"(?P<layer>w1|w2|w3|gate_proj|up_proj|down_proj)"
)
_GATES, _UPS = ("w1", "gate_proj"), ("w3", "up_proj")


@dataclass(frozen=True)
class ExpertPlace:
    """Where a linear layer of one expert lies in a stacked parameter ``[E, m, n]``.

    Attributes:
        parameter: parameter path.
        expert: which of the E.
        first: first row of the layer's weight in the expert's matrix.
        size: ``(out, in)`` of the layer.
    """

    parameter: str
    expert: int
    first: int
    size: tuple[int, int]


def place_of(path: str, stacks: Mapping[str, ParameterModule]) -> ExpertPlace | None:
    """The place of a linear layer of one expert; ``None`` if it is none, or has none.

    Before transformers 5 each expert was a module of its own; since, a block keeps all of them in
    ``mlp.experts.gate_up_proj [E, 2 * intermediate, hidden]``, gates first, and ``down_proj``.

    Args:
        path: module path of the layer, as an adapter names it.
        stacks: module path -> module with stacked parameters.
    """
    match = _OF_ONE_EXPERT.fullmatch(path)
    owner = "" if match is None else f"{match['block']}.mlp.experts"
    module = stacks.get(owner)
    if match is None or module is None or module.transposed:
        return None
    layer = match["layer"]
    fused = layer in _GATES + _UPS
    name = "gate_up_proj" if fused else "down_proj"
    shape = module.parameters.get(name, ())
    expert = int(match["expert"])
    if len(shape) != 3 or expert >= shape[0]:
        return None
    rows = shape[1] // 2 if fused else shape[1]
    return ExpertPlace(f"{owner}.{name}", expert, rows * (layer in _UPS), (rows, shape[2]))


def split_level(path: str) -> tuple[str, int]:
    """``….experts.base_layer`` -> ``(….experts, 1)``: the module, and how deep the wrapper lies."""
    level = 0
    while path.endswith(_LEVEL):
        path = path.removesuffix(_LEVEL)
        level += 1
    return path, level


def targeted(path: str, module: ParameterModule, targets: Sequence[str]) -> list[str]:
    """Names of a module's parameters that ``target_parameters`` hits, in PEFT's order."""
    return [
        name
        for name in module.parameters
        if any(f"{path}.{name}" == x or f"{path}.{name}".endswith(f".{x}") for x in targets)
    ]


def assign(
    path: str,
    module: ParameterModule,
    levels: Mapping[int, tuple[NDArray[np.float32], NDArray[np.float32]]],
    targets: Sequence[str],
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Say which parameter of a module each pair of factors belongs to.

    Args:
        path: module path.
        module: the module of the base model.
        levels: how deep the wrapper lies (:func:`split_level`) -> ``(A, B)`` as PEFT saved them.
        targets: ``target_parameters`` of the adapter's config.

    Returns:
        Name of the parameter -> ``(A, B)``.

    Raises:
        UnsupportedAdapterError: the tensors fit the parameters in another order than PEFT's.
        AdapterError: there are more or fewer pairs than targeted parameters, or no order fits.
    """
    names = targeted(path, module, targets)
    if sorted(levels) != list(range(len(names))) or not names:
        raise AdapterError(
            f"{path}: the adapter has {len(levels)} nested pairs of factors, and target_parameters "
            f"names {len(names)} of the module's parameters ({', '.join(names) or 'none'})",
            "The config and the tensors are of different adapters, or it is for another base.",
        )
    pairs = [levels[level] for level in sorted(levels, reverse=True)]  # the deepest first

    def fit(order: Sequence[str]) -> bool:
        return all(
            _layouts(module.parameters[name], *pair)
            for name, pair in zip(order, pairs, strict=True)
        )

    if fit(names):
        return dict(zip(names, pairs, strict=True))
    shapes = "; ".join(f"A {a.shape}, B {b.shape}" for a, b in pairs)
    wanted = ", ".join(f"{name} {module.parameters[name]}" for name in names)
    if any(fit(order) for order in permutations(names)):
        raise UnsupportedAdapterError(
            f"{path}: the factors, deepest first ({shapes}), fit the parameters ({wanted}) in "
            "another order than the one in which PEFT wraps them, so it is not known whose "
            "they are",
            _AGAIN,
        )
    raise AdapterError(
        f"{path}: the factors, deepest first ({shapes}), do not fit the parameters ({wanted})",
        "The adapter is for another base.",
    )


def expert_lora(
    path: str,
    shape: tuple[int, ...],
    factors: tuple[NDArray[np.float32], NDArray[np.float32]],
    scaling: float,
    *,
    transposed: bool,
    peft_version: str | None,
) -> ExpertLora:
    """A parameter's change, with the meaning of its axes decided.

    Args:
        path: parameter path.
        shape: the parameter's, ``[E, m, n]`` or ``[m, n]``.
        factors: ``(A [E·r, in], B [out, r·E])``.
        scaling: of the product.
        transposed: the module's ``is_transposed``.
        peft_version: of the config; ``None`` where it is not given (before peft 0.18).

    Raises:
        UnsupportedAdapterError: the parameter is square, and the version does not say which axis is
            which.
        AdapterError: the factors do not fit.
    """
    a, b = factors
    found = _layouts(shape, a, b)
    if not found:
        raise AdapterError(
            f"{path} {shape}: A {a.shape} and B {b.shape} do not fit",
            "The adapter is for another base.",
        )
    exchanged = found[0]
    if len(found) > 1 and len(shape) == 3 and shape[0] > 1:
        exchanged = _exchanged(path, shape, transposed, peft_version)
    return ExpertLora(path, shape, a, b, scaling, exchanged)


def _experts(shape: Sequence[int]) -> int:
    return int(shape[0]) if len(shape) == 3 else 1


def _layouts(
    shape: Sequence[int], a: NDArray[np.float32], b: NDArray[np.float32]
) -> tuple[bool, ...]:
    """The values of ``exchanged`` that fit; ``True`` first.

    PEFT adds ``B @ A`` as it is where there is one expert or none: ``in`` is the last axis there.
    """
    count = _experts(shape)
    if len(shape) not in (2, 3) or a.ndim != 2 or b.ndim != 2:
        return ()
    if a.shape[0] == 0 or a.shape[0] % count or a.shape[0] != b.shape[1]:
        return ()
    *_, m, n = shape
    sizes = (a.shape[1], b.shape[0])
    return tuple(
        exchanged
        for exchanged, wanted in ((True, (n, m)), (False, (m, n)))
        if sizes == wanted and (exchanged or count > 1)
    )


def _exchanged(path: str, shape: Sequence[int], transposed: bool, version: str | None) -> bool:
    """Which axis is "in" of a square parameter, by the release that trained the adapter."""
    if version is None:
        return False  # the field is as old as 0.18
    match = _RELEASE.fullmatch(version)
    if match is None or match["rest"]:
        raise UnsupportedAdapterError(
            f"{path} {tuple(shape)} is square, and peft_version {version!r} is no release: which "
            "axis its factor A reads is not known",
            _AGAIN,
        )
    release = tuple(int(x or 0) for x in match.groups()[:3])
    if release < (0, 19, 0):
        return False
    return transposed if release == (0, 19, 0) else not transposed
