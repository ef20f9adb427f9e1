"""Replacing parts of a model by single operators while it is traced, each only after a probe.

A swap is made only where running the model's own code shows that the operator computes the same.
All of them are undone when the block ends.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_edge.base.linear import is_linear
from lora_edge.capture.attention import RotaryUse
from lora_edge.capture.operators import Linear, Reshape, RMSNorm, Rotary

_EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon")


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for the block only."""
    had = name in vars(owner)
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, old)
        else:
            delattr(owner, name)


@contextmanager
def swapped_linears(model: nn.Module) -> Iterator[None]:
    """Each ``nn.Linear`` and ``Conv1D`` becomes one MatMul (and an Add) on 3-D activations.

    ``[batch, in]`` (a pooler, a classifier) is run as ``[batch, 1, in]``, so that a gate for each
    row broadcasts as everywhere else. The weights are expected as ``[in, out]``; a tied one stays
    ``[out, in]`` and is transposed.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if is_linear(module):
                stack.enter_context(replaced(module, "forward", _linear_forward(module)))
        yield


def _linear_forward(module: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight: Any = module.weight
        transpose = bool(getattr(weight, "lora_edge_tied", False))
        flat = x.ndim == 2
        y: Tensor = Linear.apply(x.unsqueeze(1) if flat else x, weight, transpose)
        bias: Any = module.bias
        y = y if bias is None else y + bias
        return y.squeeze(1) if flat else y

    return forward


@contextmanager
def swapped_norms(model: nn.Module) -> Iterator[None]:
    """Each RMSNorm whose formula the probe confirms becomes one operator."""
    with ExitStack() as stack:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                found = _probe_norm(module)
                if found is not None:
                    forward = _norm_forward(module, *found)
                    stack.enter_context(replaced(module, "forward", forward))
        yield


def _norm_forward(module: nn.Module, offset: float, eps: float) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight: Any = module.weight
        normalized: Tensor = RMSNorm.apply(x, weight + offset if offset else weight, eps)
        return normalized

    return forward


@torch.no_grad()
def _probe_norm(module: nn.Module) -> tuple[float, float] | None:
    """The weight's offset (0, or 1 as in Gemma) and epsilon; ``None`` if it is no RMSNorm."""
    values = (getattr(module, name, None) for name in _EPSILON_NAMES)
    eps = next((float(value) for value in values if isinstance(value, int | float)), None)
    weight = getattr(module, "weight", None)
    if eps is None or not isinstance(weight, nn.Parameter) or weight.ndim != 1:
        return None
    generator = torch.Generator().manual_seed(0)
    # Inputs near sqrt(eps), so that a wrong place of epsilon shows.
    x = torch.randn(2, 3, weight.shape[0], generator=generator) * (2 * eps**0.5)
    probe = torch.randn(weight.shape[0], generator=generator)
    module.weight = nn.Parameter(probe, requires_grad=False)
    try:
        y = module(x)
    finally:
        module.weight = weight
    normalized = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    for offset in (0.0, 1.0):
        if torch.allclose(y, normalized * (probe + offset), atol=1e-5, rtol=1e-4):
            return offset, eps
    return None


@contextmanager
def constant_views(batch: int, seq: int | None) -> Iterator[None]:
    """``view`` and ``reshape`` that keep batch and sequence become a Reshape to a constant shape.

    A model computes ``(batch, seq, heads, -1)`` from the shape of its input, which a trace records
    as a chain of small nodes for each call. The trace's batch and sequence sizes occur nowhere
    else, so a shape that starts with the tensor's own two first sizes keeps them.

    Args:
        batch: rows of the trace.
        seq: tokens of each row; ``None`` where they are not an input's, as an image's patches.
    """
    original = {name: getattr(torch.Tensor, name) for name in ("view", "reshape")}

    def patched(name: str) -> Callable[..., Tensor]:
        def call(x: Tensor, *shape: Any) -> Tensor:
            sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], list | tuple) else shape
            if (
                len(sizes) == 2
                and x.ndim == 3
                and int(x.shape[0]) == batch
                and (seq is None or int(x.shape[1]) == seq)
                and _int(sizes[0]) == -1
                and sizes[1] == x.shape[2]
            ):
                return x  # OPT flattens its tokens; a gate for each row needs them unflattened
            if (
                len(sizes) > 2
                and x.ndim > 2
                and not isinstance(sizes[0], torch.dtype)
                and int(sizes[0]) == int(x.shape[0])
                and int(sizes[1]) == int(x.shape[1])
            ):
                rest = tuple(int(size) for size in sizes[2:])
                reshaped: Tensor = Reshape.apply(x, (0, 0, *rest))
                return reshaped
            result: Tensor = original[name](x, *shape)
            return result

        return call

    with ExitStack() as stack:
        for name in original:
            stack.enter_context(replaced(torch.Tensor, name, patched(name)))
        repeat = _gathered(torch.Tensor.repeat_interleave)
        stack.enter_context(replaced(torch.Tensor, "repeat_interleave", repeat))
        yield


def _gathered(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``repeat_interleave`` along the last axis as one Gather; the exporter's own loses the rank.

    The rotary of GLM and ERNIE repeats its angles so.
    """

    def repeat_interleave(x: Tensor, repeats: Any, dim: int | None = None, **kwargs: Any) -> Tensor:
        if not isinstance(repeats, int) or dim not in (-1, x.ndim - 1) or kwargs:
            return original(x, repeats, dim, **kwargs)
        places = [place for place in range(int(x.shape[-1])) for _ in range(repeats)]
        return x.index_select(x.ndim - 1, torch.tensor(places))

    return repeat_interleave


def _int(size: Any) -> int:
    return int(size) if not isinstance(size, torch.dtype) else 0


class RotarySwap:
    """Rotary embeddings from tables, inside attention where the operator can do it.

    The tables are the model's own: its rotary module is run over all positions. The rotation is
    swapped only if the model file's ``apply_rotary_pos_emb`` is one of the two known formulas.
    Lives for one capture; :meth:`use` answers for the tensors of the pass that is going on.
    """

    def __init__(self, model: nn.Module, positions: int) -> None:
        self.tables: list[tuple[Tensor, Tensor]] = []
        self._model = model
        self._positions = positions
        self._module = importlib.import_module(type(model).__module__)
        self._original: Any = getattr(self._module, "apply_rotary_pos_emb", None)
        self._interleaved = None if self._original is None else _probe_rotation(self._original)
        self._index: dict[tuple[Any, ...], int] = {}
        self._angles: dict[int, tuple[int, Tensor, Tensor]] = {}
        self._rotated: dict[int, tuple[Tensor, Tensor, RotaryUse]] = {}

    def use(self, query: Tensor, key: Tensor) -> RotaryUse | None:
        """How to rotate inside attention, or ``None`` when these are not rotary's very results."""
        entry = self._rotated.get(id(query))
        if entry is None or entry[0] is not query or entry[1] is not key:
            return None
        # GroupQueryAttention needs a multiple of 8 and says so at run time only.
        return entry[2] if entry[2].cos.shape[1] % 8 == 0 else None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Swap the rotary modules and the rotation, where they are understood, for the block."""
        with ExitStack() as stack:
            if self._interleaved is not None:
                for module in self._model.modules():
                    if type(module).__name__.endswith("RotaryEmbedding"):
                        forward = self._angles_of(module, module.forward)
                        stack.enter_context(replaced(module, "forward", forward))
                rotate = self._rotate
                stack.enter_context(replaced(self._module, "apply_rotary_pos_emb", rotate))
            yield
        self._angles.clear()
        self._rotated.clear()

    def _angles_of(self, module: nn.Module, original: Any) -> Callable[..., tuple[Tensor, Tensor]]:
        def forward(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            key = (id(module), args, tuple(sorted(kwargs.items())))
            if key not in self._index:
                # The first pass is the survey, which is not traced.
                everywhere = torch.arange(self._positions)[None]
                cos, sin = original(torch.zeros(1), everywhere, *args, **kwargs)
                self._index[key] = len(self.tables)
                self.tables.append((_half(cos[0]), _half(sin[0])))
            index = self._index[key]
            cos, sin = original(x, position_ids, *args, **kwargs)
            self._angles[id(cos)] = (index, cos, position_ids)
            return cos, sin

        return forward

    def _rotate(
        self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kw: Any
    ) -> Any:
        rotated = self._original(query, key, cos, sin, *args, **kw)
        entry = self._angles.get(id(cos))
        unsqueezed_at_1 = all(value in (None, 1) for value in (*args, *kw.values()))
        if entry is None or entry[1] is not cos or not unsqueezed_at_1 or query.ndim != 4:
            return rotated
        table_cos, table_sin = self.tables[entry[0]]
        use = RotaryUse(query, key, table_cos, table_sin, bool(self._interleaved))
        if table_cos.shape[1] % 8:
            positions, size = entry[2], 2 * int(table_cos.shape[1])
            rotated = tuple(
                Rotary.apply(
                    x,
                    positions,
                    table_cos,
                    table_sin,
                    int(x.shape[1]),
                    0 if size == int(x.shape[3]) else size,
                    bool(self._interleaved),
                )
                for x in (query, key)
            )
        self._rotated[id(rotated[0])] = (rotated[0], rotated[1], use)
        return rotated


def _half(angles: Tensor) -> Tensor:
    """``[positions, rotary_dim]`` with every angle twice -> ``[positions, rotary_dim / 2]``."""
    half = angles.shape[1] // 2
    halves = torch.equal(angles[:, :half], angles[:, half:])
    return (angles[:, :half] if halves else angles[:, ::2]).detach().clone()


def _rotation(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    size = 2 * cos.shape[-1]
    turned, kept = x[..., :size], x[..., size:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, -1)
    one, two = first * cos - second * sin, second * cos + first * sin
    both = torch.stack((one, two), -1).flatten(-2) if interleaved else torch.cat((one, two), -1)
    return torch.cat((both, kept), -1)


@torch.no_grad()
def _probe_rotation(function: Any) -> bool | None:
    """Whether a rotation is interleaved; ``None`` when it is neither of the known formulas."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 3, 8, generator=generator) for heads in (2, 1))
    angles = torch.randn(1, 3, 4, generator=generator)
    for interleaved in (False, True):
        full = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
        try:
            results = function(query, key, full.cos(), full.sin())
        except (RuntimeError, TypeError, IndexError, ValueError):
            return None
        wanted = [
            _rotation(x, angles.cos()[:, None], angles.sin()[:, None], interleaved)
            for x in (query, key)
        ]
        if all(torch.allclose(a, b, atol=1e-5) for a, b in zip(results, wanted, strict=True)):
            return interleaved
    return None
