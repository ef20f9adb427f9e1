"""Experts of a base: the parameters that an adapter may target, and the loops that are refused."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_edge.base.linear import is_linear
from lora_edge.errors import UnsupportedModelError
from lora_edge.maths.experts import ParameterModule

_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed")


_WAY_OUT = "Use a family that docs/families.md names, in an environment with transformers 5."


def parameter_modules(model: nn.Module) -> dict[str, ParameterModule]:
    """Module path -> its own 2-D and 3-D parameters, of the experts and routers of every block."""
    found: dict[str, ParameterModule] = {}
    for path, module in model.named_modules():
        if has_interface(module):
            parent = path.rpartition(".")[0]
            for name, child in model.get_submodule(parent).named_children():
                if child is module or is_router(child, module):
                    shapes = {
                        own: tuple(parameter.shape)
                        for own, parameter in child.named_parameters(recurse=False)
                        if parameter.ndim in (2, 3)
                    }
                    transposed = bool(getattr(child, "is_transposed", False))
                    if shapes:
                        found[f"{parent}.{name}"] = ParameterModule(shapes, transposed)
    return found


def has_interface(module: nn.Module) -> bool:
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
        if has_interface(module):
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


def is_router(module: nn.Module, experts: Any) -> bool:
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
