"""A bundle in float16: what of the base fits, and its graphs once their weights are stored so.

Knows captures, passes and where the files of a bundle are; knows nothing of manifests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_edge.base.checkpoint import Base
from lora_edge.base.layer import Layer
from lora_edge.bundle.bundle import (
    BASE_GRAPH_FILE,
    DATA_FILE,
    EXACT_GRAPH_FILE,
    GRAPH_FILE,
    ROWS_GRAPH_FILE,
    SINGLE_GRAPH_FILE,
)
from lora_edge.bundle.part import SiteEntry, WeightEntry
from lora_edge.errors import BaseModelError, UnsupportedModelError
from lora_edge.exporting.graphs import Progress
from lora_edge.maths.half import HALF_BITS, halved, overflow
from lora_edge.maths.quantization import Quantization
from lora_edge.tasks.task import Task

_MERGED_KINDS = ("linear", "embedding", "head", "norm")


def half_of(
    base: Base, task: Task, model: Any, matrices: Collection[str], *, merged: bool, say: Progress
) -> tuple[Quantization, frozenset[str]]:
    """How a base is rounded to float16; says the errors.

    Args:
        base: the base.
        task: what it does: a head of labels stays float32, because adapters bring their own.
        model: its graph, whose weights are called by parameter path.
        matrices: paths of the base's parameters of two dimensions and more.
        merged: an adapter is merged before.
        say: called with a line.

    Returns:
        The rounding, and the paths of what is stored so.

    Raises:
        BaseModelError: float16 cannot hold a number of it.
    """
    errors = []
    stored = frozenset(x for x in matrices if not task.in_head(x))
    kept = {x.rpartition(".")[0] for x in matrices if task.in_head(x)}
    for name, initializer in model.graph.initializers.items():
        value = None if initializer.const_value is None else initializer.const_value.numpy()
        if value is None or value.dtype != np.float32 or name.startswith(("/", "onnx::")):
            continue
        largest = overflow(value)
        if largest:
            raise BaseModelError(
                f"{base.name_or_path}: {name} holds {largest:.6g}, and float16 has no number above "
                "65504",
                "Use --precision fp32.",
            )
        size = float(np.linalg.norm(value)) if name in stored else 0.0
        if size:
            errors.append(float(np.linalg.norm(halved(value) - value)) / size)
    mean, worst = sum(errors) / max(len(errors), 1), max(errors, default=0.0)
    say(
        f"storing {len(errors)} weights in float16: ‖W - Q(W)‖ / ‖W‖ is {mean:.3g} in the mean, "
        f"{worst:.3g} at worst"
    )
    made = Quantization(
        HALF_BITS,
        1,
        (),
        mean_error=mean,
        worst_error=worst,
        merged_first=merged,
        kept=tuple(sorted(kept)),
    )
    return made, stored


def check_merged(changes: Iterable[str], modules: Mapping[str, Layer], who: str) -> None:
    """Check that the reference can round what an adapter is merged into.

    Raises:
        UnsupportedModelError: it changes a convolution or a mixture's experts.
    """
    for parameter in changes:
        layer = modules.get(parameter.rpartition(".")[0])
        if layer is None or layer.kind not in _MERGED_KINDS:
            what = "a mixture's expert" if layer is None else f"the {layer.kind} layer"
            raise UnsupportedModelError(
                f"--precision fp16 merges into linear layers, embeddings and norms, and adapter "
                f"{who} changes {what} {parameter}",
                "Use --precision fp32, or --mode switchable.",
            )


def write_half(
    stage: Path, weights: Collection[str], covered: Mapping[str, SiteEntry]
) -> dict[str, SiteEntry]:
    """Let a bundle's graphs compute in float16; one in float32, on the same data, is kept beside.

    Args:
        stage: where the bundle is made; its graphs are float32, on one data file.
        weights: names of what is stored in float16.
        covered: module path -> layer with inputs.

    Returns:
        The layers, with where the new data file has their weights.

    Raises:
        GraphError: float16 cannot hold a number of the graph.
    """
    from lora_edge import graph as passes

    path = stage / GRAPH_FILE
    model = passes.load(path)
    passes.store_half(model, weights)
    folder = path.parent / "half"
    folder.mkdir()
    passes.save_with_data(model, folder / path.name)
    others = {
        file: passes.load(stage / file)
        for file in (BASE_GRAPH_FILE, SINGLE_GRAPH_FILE, ROWS_GRAPH_FILE)
        if (stage / file).is_file()
    }
    (folder / path.name).replace(stage / EXACT_GRAPH_FILE)
    (stage / DATA_FILE).unlink(missing_ok=True)
    data = folder / Path(DATA_FILE).name
    if data.is_file():
        data.replace(stage / DATA_FILE)
    folder.rmdir()
    exact = passes.load(stage / EXACT_GRAPH_FILE)
    for file, other in others.items():
        passes.store_half(other, weights)
        passes.read_from(other, exact)
        passes.compute_half(other)
        passes.save_graph(other, stage / file)
    places = {
        name: place
        for name in exact.graph.initializers
        if (place := passes.data_place(exact, name)) is not None
    }
    passes.compute_half(exact)
    passes.save_graph(exact, path)
    return {
        layer: dataclasses.replace(site, weight=_moved(site.weight, places))
        for layer, site in covered.items()
    }


def _moved(weight: WeightEntry | None, places: Mapping[str, tuple[int, str]]) -> WeightEntry | None:
    """Where a weight lies now; ``None``: the graph holds it."""
    if weight is None or weight.name not in places:
        return None
    offset, dtype = places[weight.name]
    return dataclasses.replace(weight, offset=offset, dtype=dtype)  # type: ignore[arg-type]
