"""Mixture-of-experts blocks while they are traced: experts as batched products, no loop over data.

transformers 5 keeps a block's experts in two 3-D parameters and lets their forward be replaced
(``transformers/integrations/moe.py``); the replacement here has the same contract,
``(hidden, top_k_index, top_k_weights) -> hidden``, and two ways to compute it:

*dense*: every expert on every token, weighted by the dense routing matrix, which is zero where an
expert was not chosen. Standard operators, no weight copied or transposed; ``E / k`` times the work.
*sparse*: the chosen experts' weights gathered for each token. The least work for a few tokens, and
``tokens * k`` copies of an expert's weights in memory, so only for a few.

The portable form is dense. The fused form takes the sparse way where
``2 * tokens * k <= E``, by an ``If`` (:class:`lora_edge.capture.operators.Choose`). On two CPU
cores, one block of hidden size 512, milliseconds sparse and dense: 2 of 8 experts of 1024, one
token 1.9 and 12, two (the limit) 10 and 14, 256 tokens 1296 and 191; 8 of 64 experts of 256, one
token 0.4 and 14, four (the limit) 14 and 15, 256 tokens 1544 and 544.
``com.microsoft.MoE`` computes sparsely without copies, but on the CPU only with gate and up columns
interleaved, which no model but gpt_oss has: the weights would have to be rewritten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_edge.capture.operators import BatchedMatMul, Choose, GatherRows, Reshape, ReshapeLike
from lora_edge.capture.swaps import is_linear, replaced
from lora_edge.errors import UnsupportedModelError
from lora_edge.experts import ParameterModule

_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed")
_WAY_OUT = "Use a family that docs/families.md names, in an environment with transformers 5."


def parameter_modules(model: nn.Module) -> dict[str, ParameterModule]:
    """Module path -> its own 2-D and 3-D parameters, of the experts and routers of every block."""
    found: dict[str, ParameterModule] = {}
    for path, module in model.named_modules():
        if _has_interface(module):
            parent = path.rpartition(".")[0]
            for name, child in model.get_submodule(parent).named_children():
                if child is module or _is_router(child, module):
                    shapes = {
                        own: tuple(parameter.shape)
                        for own, parameter in child.named_parameters(recurse=False)
                        if parameter.ndim in (2, 3)
                    }
                    transposed = bool(getattr(child, "is_transposed", False))
                    if shapes:
                        found[f"{parent}.{name}"] = ParameterModule(shapes, transposed)
    return found


def _has_interface(module: nn.Module) -> bool:
    return all(hasattr(module, flag) for flag in _FLAGS)


def refuse_loops(model: nn.Module, model_type: str, field: str | None) -> None:
    """Refuse experts that are computed in a loop over what the router chose.

    A trace would keep the choice of the traced tokens, and a branch or a merge would have to follow
    tokens to their experts.

    Args:
        model: the model; its weights are not read, so it may be on the meta device.
        model_type: of its config.
        field: ``name is value`` of the config field that says that there are experts, or ``None``.

    Raises:
        UnsupportedModelError: names the module, the reason and the way out.
    """
    stacked = False
    for path, module in model.named_modules():
        if _has_interface(module):
            stacked = True
            if module.has_post_expert_norm:
                _refuse(model_type, path, "each expert's output goes through a norm of its own")
        elif path.rpartition(".")[2] == "experts" and isinstance(module, nn.ModuleList):
            _refuse(
                model_type,
                path,
                "its experts are separate linear layers in a loop, and which tokens each of them "
                "sees depends on the data; transformers 5 stacks them in one parameter",
            )
        elif type(module).__name__.endswith("Experts"):
            _refuse(model_type, path, f"{type(module).__name__} has no common experts interface")
    if field is not None and not stacked:
        _refuse(model_type, field, "it has experts, and no module with the common interface")


def _refuse(model_type: str, where: str, reason: str) -> None:
    raise UnsupportedModelError(
        f"{model_type} models are refused: mixture of experts: {where}: {reason}", _WAY_OUT
    )


@contextmanager
def swapped_experts(model: nn.Module, *, sparse: bool) -> Iterator[set[str]]:
    """Compute experts by batched products for the block, and routers on flattened tokens.

    Args:
        model: the model.
        sparse: gather the chosen experts where that is less work; emits
            :class:`~lora_edge.capture.operators.Choose`, which must be lowered afterwards.

    Yields:
        Filled while the model is traced: linear layers inside a mixture-of-experts block whose
        activations were not ``[batch, seq, in]``. A gate for each row does not fit them.
    """
    flattened: set[str] = set()
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if not _has_interface(module):
                continue
            stack.enter_context(replaced(module, "forward", _experts_forward(module, sparse)))
            parent = path.rpartition(".")[0]
            block = model.get_submodule(parent)
            for child in block.children():
                if _is_router(child, module):
                    forward = _flattening(child.forward)
                    stack.enter_context(replaced(child, "forward", forward))
            for name, linear in block.named_modules():
                if is_linear(linear):
                    watch = _watch(f"{parent}.{name}", flattened)
                    stack.callback(linear.register_forward_pre_hook(watch).remove)
        yield flattened


def _is_router(module: nn.Module, experts: Any) -> bool:
    """Whether a sibling of the experts, other than a linear layer, weighs each of them.

    Routers of some families scatter and take a softmax over the second axis, so they get the two
    axes that they were written for. Elsewhere in a block tokens are not flattened, see
    :func:`lora_edge.capture.swaps.constant_views`.
    """
    if module is experts or is_linear(module):
        return False
    count = experts.num_experts
    # While it is traced, a linear layer's weight is turned, and says nothing of the layer.
    return any(
        getattr(part, "out_features", None) == count
        or any(x.ndim == 2 and x.shape[0] == count for x in part.parameters(recurse=False))
        for part in module.modules()
    )


def _flattening(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(_rows(x), *args, **kwargs)

    return forward


def _watch(path: str, flattened: set[str]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:  # noqa: ARG001
        if args[0].ndim != 3:
            flattened.add(path)

    return hook


def _rows(x: Tensor) -> Tensor:
    """``[..., n]`` -> ``[tokens, n]``."""
    rows: Tensor = x if x.ndim == 2 else Reshape.apply(x, (-1, int(x.shape[-1])))
    return rows


def _experts_forward(module: Any, sparse: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    own_gate = _own_gate(module)

    def forward(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        experts = _Experts(
            getattr(module, up_name),
            module.down_proj,
            getattr(module, f"{up_name}_bias") if module.has_bias else None,
            module.down_proj_bias if module.has_bias else None,
            bool(module.is_transposed),
            own_gate or module.act_fn,
            bool(module.has_gate and own_gate is None),
        )
        x, index, weights = _rows(hidden), _rows(top_k_index), _rows(top_k_weights)
        y = experts.dense(x, index, weights)
        if sparse:
            few = experts.sparse(x, index, weights)
            y = Choose.apply(few, y, index, int(module.num_experts) // 2)
        back: Tensor = y if hidden.ndim == 2 else ReshapeLike.apply(y, hidden)
        return back

    return forward


def _own_gate(module: Any) -> Callable[[Tensor], Tensor] | None:
    """A family's own gating of ``[..., 2 * intermediate]``; ``None`` for ``act(gate) * up``."""
    from transformers.integrations import moe

    if not module.has_gate or type(module)._apply_gate is moe._default_apply_gate:
        return None
    gate: Callable[[Tensor], Tensor] = module._apply_gate
    return gate


@dataclass(frozen=True)
class _Experts:
    """The parameters of one block's experts, and their activation."""

    up: Tensor  # [E, out, in], or [E, in, out] when transposed; so is down
    down: Tensor
    up_bias: Tensor | None  # [E, out]
    down_bias: Tensor | None
    transposed: bool
    activation: Callable[[Tensor], Tensor]
    halves: bool  # activation(first half) * second half, else activation of the whole

    def dense(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """``x [T, hidden]``, ``index``, ``weights [T, k]`` -> ``[T, hidden]``."""
        everyone = torch.arange(self.up.shape[0])
        chosen = (index.unsqueeze(2) == everyone).to(weights.dtype) * weights.unsqueeze(2)
        routing = chosen.sum(1)  # [T, E]
        if self.transposed:
            inner = self._biased(BatchedMatMul.apply(x, self.up), self.up_bias, 1)  # [E, T, ...]
            inner = self._activate(inner, 2) * routing.t().unsqueeze(2)
            y = BatchedMatMul.apply(inner, self.down).sum(0)
        else:
            # The tokens are turned, not the weights: [E, out, in] @ [in, T].
            inner = self._biased(BatchedMatMul.apply(self.up, x.t()), self.up_bias, 2)
            if self.halves:
                inner = self._activate(inner, 1)
            else:  # written for the last axis
                inner = self._activate(inner.transpose(1, 2), 2).transpose(1, 2)
            inner = inner * routing.t().unsqueeze(1)
            y = BatchedMatMul.apply(self.down, inner).sum(0).t()
        if self.down_bias is not None:
            y = y + torch.matmul(routing, self.down_bias)
        result: Tensor = y
        return result

    def sparse(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The same from ``[T, k, out, in]`` weights of the chosen experts."""
        up, down = GatherRows.apply(self.up, index), GatherRows.apply(self.down, index)
        axis = 2 if self.transposed else 3
        inner = self._one(x.unsqueeze(1).unsqueeze(axis), up, axis)  # [T, k, out]
        if self.up_bias is not None:
            inner = inner + GatherRows.apply(self.up_bias, index)
        y = self._one(self._activate(inner, 2).unsqueeze(axis), down, axis)
        if self.down_bias is not None:
            y = y + GatherRows.apply(self.down_bias, index)
        return (y * weights.unsqueeze(2)).sum(1)

    def _one(self, x: Tensor, weight: Tensor, axis: int) -> Tensor:
        """One vector for each weight; ``axis`` of ``x`` is the one of size 1."""
        pair = (x, weight) if self.transposed else (weight, x)
        y: Tensor = BatchedMatMul.apply(*pair).squeeze(axis)
        return y

    def _activate(self, inner: Tensor, axis: int) -> Tensor:
        if not self.halves:
            return self.activation(inner)
        gate, up = inner.split(int(inner.shape[axis]) // 2, axis)
        return self.activation(gate) * up

    @staticmethod
    def _biased(inner: Tensor, bias: Tensor | None, axis: int) -> Tensor:
        return inner if bias is None else inner + bias.unsqueeze(axis)
