"""Bundles with one known fault, their hashes made right again; and a runner with one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from lora_edge.bundle.bundle import Bundle, file_entries, load_bundle
from lora_edge.bundle.onnx_adapter import read_adapter, write_adapter
from lora_edge.graph import load, save_with_data
from lora_edge.runtime import Binding, Runner

Array = np.ndarray


def signed(directory: Path) -> Bundle:
    """The bundle with the hashes of its files as they are: only the numbers can tell a change."""
    bundle = load_bundle(directory)
    return bundle.write_manifest(replace(bundle.manifest, files=file_entries(directory)))


def with_tensor(
    good: Path, directory: Path, adapter: str, name: str, change: Callable[[Array], Array]
) -> Bundle:
    """A copy of a bundle in which one tensor of one adapter's file is another."""
    shutil.copytree(good, directory)
    path = directory / load_bundle(directory).adapter(adapter).file
    tensors = read_adapter(path)
    write_adapter(path, {**tensors, name: change(tensors[name])})
    return signed(directory)


def with_graph(good: Path, directory: Path, change: Callable[[ir.Model], None]) -> Bundle:
    """A copy of a bundle with a changed graph."""
    shutil.copytree(good, directory)
    shutil.rmtree(directory / "onnx")
    (directory / "onnx").mkdir()
    model = load(good / "onnx" / "model.onnx")
    change(model)
    save_with_data(model, directory / "onnx" / "model.onnx")
    return signed(directory)


def with_weight(
    good: Path, directory: Path, parameter: str, change: Callable[[Array], Array]
) -> Bundle:
    """A copy of a bundle in which one weight of the graph is another."""

    def exchange(model: ir.Model) -> None:
        value = model.graph.initializers[parameter]
        assert value.const_value is not None
        values = change(value.const_value.numpy().copy())
        value.const_value = ir.tensor(values, name=parameter)

    return with_graph(good, directory, exchange)


def leak_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row of a batch gets the adapter of the next, from here on."""
    binding = Runner.binding

    def leaking(self: Runner, adapter: Any, batch: int) -> Binding:
        shifted = [*adapter[1:], adapter[0]] if isinstance(adapter, list) else adapter
        return binding(self, shifted, batch)

    monkeypatch.setattr(Runner, "binding", leaking)
