"""Graphs with inputs and expected outputs in the layout of ONNX's backend tests.

``model.onnx`` (and its data), ``test_data_set_N/input_K.pb`` and ``output_K.pb`` in the order of
the graph's inputs and outputs: what ``onnx_test_runner`` and its like replay.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from lora_edge.errors import GraphError


@dataclass(frozen=True)
class DataSet:
    """One run of a graph.

    Attributes:
        inputs: graph input name -> array; every input of the graph.
        outputs: graph output name -> what is expected; every output of the graph.
    """

    inputs: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]


def write_test_data(directory: Path, graph: Path, sets: Sequence[DataSet]) -> None:
    """Write a graph and its data sets into a folder that exists.

    Args:
        directory: the folder.
        graph: the ONNX file; external data beside it is copied along.
        sets: numbered from 0.

    Raises:
        GraphError: an input or output of the graph is missing in a set.
    """
    model = onnx.load(graph, load_external_data=False)
    shutil.copyfile(graph, directory / "model.onnx")
    tensors = model.graph.initializer
    parts = {entry.value for x in tensors for entry in x.external_data if entry.key == "location"}
    for part in sorted(parts):
        shutil.copyfile(graph.parent / part, directory / part)
    for number, each in enumerate(sets):
        folder = directory / f"test_data_set_{number}"
        folder.mkdir()
        for kind, values, arrays in (
            ("input", model.graph.input, each.inputs),
            ("output", model.graph.output, each.outputs),
        ):
            for index, value in enumerate(values):
                if value.name not in arrays:
                    raise GraphError(
                        f"data set {number} lacks the {kind} {value.name}",
                        "This is a fault of lora-edge; report it.",
                    )
                tensor = numpy_helper.from_array(arrays[value.name], value.name)
                (folder / f"{kind}_{index}.pb").write_bytes(tensor.SerializeToString())
