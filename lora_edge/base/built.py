"""The layers of a base as transformers builds it, without its weights.

A checkpoint may call its parameters otherwise than the model does, and says nothing of what kind a
layer is; the model itself does, on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.base.checkpoint import Base
from lora_edge.base.experts import parameter_modules, refuse_loops
from lora_edge.base.families import refuse_unloadable, refuse_untraceable
from lora_edge.base.layers import Layers
from lora_edge.base.model import (
    empty_model,
    load_model,
    loading,
    model_layers,
    path_of,
    read_config,
    refuse_experts,
    tied_pair,
)
from lora_edge.base.quiet import quiet
from lora_edge.errors import UnsupportedModelError
from lora_edge.tasks.task import Task


def layers_of(base: Base, task: Task) -> Layers:
    """Build a base without its weights; see :func:`lora_edge.capture.built_layers`."""
    refuse_unloadable(base.config, task)
    with loading(base, task, None), quiet():
        config = read_config(base, task)
        model: Any = empty_model(config, task)
    task.complete(model, ())  # drops what nobody reads
    modules = model_layers(model)
    layer = model.get_output_embeddings()
    output = "" if layer is None else path_of(model, layer)
    if head := task.label_layer(model):
        modules[head] = replace(modules[head], kind="head")
    refused: UnsupportedModelError | None = None
    try:
        refuse_untraceable(config.to_dict(), task)
        refuse_experts(base, config, task, model)
        refuse_loops(model, base.model_type, None)
    except UnsupportedModelError as error:
        refused = error
    return Layers(modules, tied_pair(model), parameter_modules(model), refused, output, head)


def weights_of(base: Base, task: Task) -> Callable[[str], NDArray[np.floating] | None]:
    """Read a base; see :func:`lora_edge.capture.built_weights`."""
    model = load_model(base, None, task)
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def weight(path: str) -> NDArray[np.floating] | None:
        made_up = task.in_head(path) and base.parameter(path) is None
        value = None if made_up else parameters.get(path)
        if value is None:
            return None
        found: NDArray[np.floating] = value.detach().numpy()
        return found

    return weight
