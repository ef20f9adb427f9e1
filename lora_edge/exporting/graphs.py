"""Graphs of a bundle: a capture with an adapter in its weights, or with branches.

Knows captures, passes and where the files of a bundle are; knows nothing of manifests.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.base.layer import Layer
from lora_edge.bundle.bundle import (
    BASE_GRAPH_FILE,
    ROWS_GRAPH_FILE,
    SINGLE_GRAPH_FILE,
    exact_file,
)
from lora_edge.bundle.part import Part, SiteEntry, WeightEntry
from lora_edge.fit.changes import ParameterChange
from lora_edge.maths.quantization import Quantization

Progress = Callable[[str], None]
Weights = Callable[[str], "NDArray[np.floating] | None"]


def published(part: Part) -> str:
    """Where a captured graph will be in the bundle."""
    return f"onnx/{part.file}"


@dataclass(frozen=True)
class Graphs:
    """What is captured of a base, on its way into a bundle.

    Attributes:
        captured: the :class:`~lora_edge.capture.BaseGraph`.
        models: part -> its graph; changed by what writes it.
        modules: module path -> layer that an adapter may change.
        weights: the base's parameters, rounded where the graphs' will be.
        quantization: how the graphs' weights are rounded; ``None``: they are not.
        stage: where the bundle is made.
    """

    captured: Any
    models: Mapping[str, Any]
    modules: Mapping[str, Layer]
    weights: Weights
    quantization: Quantization | None
    stage: Path

    def write_merged(self, changes: Mapping[str, ParameterChange], say: Progress) -> None:
        """Write each graph with the changes in its weights."""
        from lora_edge import graph as passes

        modules, floats = self.modules, 0
        for part, model in self.models.items():
            coded, touched = self._rounded_before(model, changes)
            floats += touched
            own = {
                path: change
                for path, change in changes.items()
                if path not in coded and self.captured.part_of(path.rpartition(".")[0]) == part
            }
            owners = {path.rpartition(".")[0] for path in own} & set(modules)
            layers = {path: SiteEntry.of(modules[path]) for path in sorted(owners)}
            passes.merge(model, passes.find_sites(model, layers, self.weights), own, self.weights)
            passes.unsplit_attention(model)
            passes.save_with_data(model, self._target(part))
        if floats:
            say(f"{floats} layers stay in fp32: the adapter is in their rounded weights")

    def _rounded_before(
        self, model: Any, changes: Mapping[str, ParameterChange]
    ) -> tuple[set[str], int]:
        """Put codes into a graph that is to be merged into.

        Returns:
            Parameters whose changes are in the codes; number of layers that are to be merged into
            after they were rounded.
        """
        from lora_edge import graph as passes

        quantization, modules = self.quantization, self.captured.modules
        if quantization is None:
            return set(), 0
        layers = passes.present(model, modules, quantization.layers)
        coded: set[str] = set()
        touched: list[str] = []
        if quantization.merged_first:
            passes.quantize_layers(model, modules, layers, quantization, changes)
            coded = {f"{path}.weight" for path in layers}
        else:
            matrices = {path.removesuffix(".weight") for path in changes}
            tied = set(self.captured.tied)
            if matrices & tied and tied <= set(layers):
                matrices |= tied  # one weight, of which the other's copy is made
            touched = [path for path in layers if path in matrices]
            others = [path for path in layers if path not in matrices]
            passes.quantize_layers(model, modules, others, quantization)
            passes.round_layers(model, modules, touched, quantization)
        passes.pack(model)
        return coded, len(touched)

    def write_branched(self, covered: Mapping[str, SiteEntry]) -> dict[str, SiteEntry]:
        """Write each graph with branches; of a decoder, on the same data, one without, one without
        gates, and, where all pairs allow it, one with pairs for each row.

        Returns:
            The layers, with where the data file has their weights.
        """
        from lora_edge import graph as passes

        captured, quantization = self.captured, self.quantization
        located = dict(covered)
        for part, source in self.models.items():
            path, model = captured.path(part), source
            if quantization is not None:
                modules = captured.modules
                layers = passes.present(model, modules, quantization.layers)
                passes.quantize_layers(model, modules, layers, quantization)
                passes.pack(model)
                path = path.parent / "quantized" / path.name
                path.parent.mkdir(exist_ok=True)
                passes.save_with_data(model, path)
                model = passes.load(path)
            own = {x: site for x, site in covered.items() if captured.part_of(x) == part}
            found = passes.find_sites(model, own, self.weights)
            plain = path.with_name("base.onnx")
            cached = captured.parts[part].cache is not None
            if cached:
                base = passes.load(path)
                passes.unsplit_attention(base)
                passes.save_graph(base, plain)
                located |= with_weights(own, found)
            passes.branch(model, found)
            # Beside its data, which is moved and never rewritten.
            passes.save_graph(model, path)
            target = self._target(part)
            path.rename(target)
            data = path.with_name(f"{path.name}_data")
            data.rename(target.with_name(data.name))
            if cached:
                plain.rename(self.stage / BASE_GRAPH_FILE)
                single = passes.load(target)
                passes.ungate(single)
                passes.save_graph(single, self.stage / SINGLE_GRAPH_FILE)
                paired = [site for site in own.values() if "A" in site.parts]
                if all(site.kind == "linear" and site.rank == 3 for site in paired):
                    passes.by_row(single)
                    passes.save_graph(single, self.stage / ROWS_GRAPH_FILE)
        return located

    def _target(self, part: str) -> Path:
        return self.stage / published(self.captured.parts[part])


def write_fast(stage: Path, graphs: Collection[str]) -> None:
    """Let quantized layers compute in int8; each graph of a part is kept beside it in floats.

    Args:
        stage: where the bundle is made.
        graphs: the files of its parts.
    """
    from lora_edge import graph as passes

    for file in graphs:
        shutil.copyfile(stage / file, stage / exact_file(file))
    for path in map(stage.joinpath, (*graphs, BASE_GRAPH_FILE, SINGLE_GRAPH_FILE, ROWS_GRAPH_FILE)):
        if path.is_file():
            model = passes.load(path)
            passes.compute_in(model, "int8")
            passes.save_graph(model, path)


def with_weights(layers: Mapping[str, SiteEntry], found: Mapping[str, Any]) -> dict[str, SiteEntry]:
    """The layers, with where the data file has their weights.

    Args:
        layers: module path -> layer.
        found: module path -> :class:`~lora_edge.graph.Site`, before anything replaces a weight.
    """
    from lora_edge.graph import stored_weight

    located = dict(layers)
    for path, layer in layers.items():
        stored = stored_weight(found[path])
        if stored is not None:
            located[path] = dataclasses.replace(layer, weight=WeightEntry(**stored._asdict()))
    return located
