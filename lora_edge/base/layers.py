"""All layers of a base, as transformers builds it: what an adapter may change.

Needs PyTorch only when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_edge.base.checkpoint import Base
from lora_edge.base.layer import Layer
from lora_edge.errors import LoraEdgeError, MissingDependencyError
from lora_edge.maths.experts import ParameterModule
from lora_edge.tasks.task import Task


@dataclass(frozen=True)
class Layers:
    """What an adapter may change of a base, as transformers builds it.

    Attributes:
        modules: module path -> sizes and kind of a layer.
        tied: module paths of the embedding and of the head that shares its weight, or ().
        parameter_modules: as :class:`lora_edge.capture.BaseGraph` has them.
        refused: why the trace backend refuses the base, if that can be told without its weights.
        output: module path of the output layer of a text generator; empty: none.
        head: module path of the layer that makes a task's labels; empty: none.
    """

    modules: Mapping[str, Layer]
    tied: tuple[str, ...]
    parameter_modules: Mapping[str, ParameterModule]
    refused: LoraEdgeError | None
    output: str = ""
    head: str = ""


def built_layers(base: Base, task: Task) -> Layers:
    """The layers of a base, without reading its weights.

    Args:
        base: the model.
        task: what it is to do.

    Raises:
        MissingDependencyError: the extra ``export`` is not installed.
        UnsupportedModelError: no backend takes the model.
        BaseModelError: transformers cannot build it.
    """
    try:
        from lora_edge.base.built import layers_of
    except ImportError as error:
        raise MissingDependencyError.of_export(error) from error
    return layers_of(base, task)


def built_weights(base: Base, task: Task) -> Callable[[str], NDArray[np.floating] | None]:
    """Parameter path of the built model -> its value; ``None`` where the base has none.

    Reads the whole model, which takes its size in float32.

    Raises:
        MissingDependencyError, UnsupportedModelError, BaseModelError: as :func:`built_layers`.
    """
    try:
        from lora_edge.base.built import weights_of
    except ImportError as error:
        raise MissingDependencyError.of_export(error) from error
    return weights_of(base, task)
