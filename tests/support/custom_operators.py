"""Small PyTorch modules -> ONNX, PEFT adapters on them, and both modes on ONNX Runtime.

The oracle is PEFT's unmerged forward of the same module, with the adapter read back from disk.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import lora_edge
from lora_edge import graph as passes
from lora_edge.adapter.load import Adapter
from lora_edge.base.model import model_layers
from lora_edge.bundle.adapter_files import graph_tensors
from lora_edge.bundle.part import SiteEntry
from lora_edge.capture.refusing import noted_activations
from lora_edge.capture.swaps import swapped_linears
from lora_edge.capture.torchscript import name_nodes, to_onnx
from lora_edge.capture.weights import attach, placeholders
from lora_edge.fit.changes import parameter_changes, site_changes
from lora_edge.fit.check import check_copies, check_modules
from lora_edge.maths.lora import SiteChange
from lora_edge.names import InputPart
from lora_edge.runtime.adapters.active import ActiveAdapters, AdapterArgument
from lora_edge.runtime.adapters.binding import Tensors

Array = NDArray[np.float32]
Change = dict[str, SiteChange]


class _Traced(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.model(x)
        return found


@dataclass
class Custom:
    """A module as captures make a base graph of it: named weights, one MatMul for a linear layer.

    Args:
        model: the module, in evaluation mode; not changed.
        x: an input of three rows.
        directory: where its files go.
    """

    model: nn.Module
    x: Tensor
    directory: Path
    modules: dict[str, SiteEntry] = field(init=False)
    _session: ort.InferenceSession | None = None

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        model = _Traced(copy.deepcopy(self.model))
        self.modules = model_layers(model.model)
        with torch.no_grad(), noted_activations(model.model, self.modules):
            model(self.x)
        torch.backends.mha.set_fastpath_enabled(False)  # which has no ONNX operator
        with (
            placeholders(model.model) as weights,
            swapped_linears(model.model),
            warnings.catch_warnings(),
        ):
            # Of the shape of a padding that is not of zeros.
            warnings.filterwarnings("ignore", "Constant folding - Only steps=1", UserWarning)
            warnings.filterwarnings("ignore", "Exporting a model to ONNX with a batch_size")
            dims = {"x": {0: "batch"}, "y": {0: "batch"}}
            graph = to_onnx(model, {"x": self.x}, ["y"], dims)
        assert attach(graph, weights, self.directory / "model.onnx_data") == []
        name_nodes(graph)
        onnx.save(graph, self.directory / "model.onnx")

    def weights(self, path: str) -> Array | None:
        """A parameter of the base, as a checkpoint gives it."""
        value = self.model.state_dict().get(path)
        return None if value is None else value.numpy().copy()

    def base(self) -> Array:
        """The base's output in PyTorch."""
        return self._torch(self.model)

    def expected(self, adapter: Path) -> Array:
        """PEFT's unmerged output, the adapter read from disk."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._torch(PeftModel.from_pretrained(copy.deepcopy(self.model), adapter).eval())

    def _torch(self, model: nn.Module) -> Array:
        with torch.no_grad():
            found: Array = model(self.x).numpy()
        return found

    def changes(self, adapter: Adapter) -> Change:
        """What an adapter changes at each site, checked as an export does."""
        adapter.check_mode("switchable")
        adapter = adapter.settled(self.modules)
        check_modules(adapter, self.modules, "the module")
        check_copies(adapter, self.weights, ())
        return site_changes(adapter, self.modules, self.weights, ())

    def switchable(self, changes: Mapping[str, Change]) -> Switchable:
        """A graph that takes some adapters, by name."""
        covered = {}
        for path, entry in self.modules.items():
            needed = {p for each in changes.values() for p in each.get(path, SiteChange()).parts()}
            if needed:
                parts = tuple(part for part in get_args(InputPart) if part in needed)
                covered[path] = SiteEntry.of(entry, parts)
        model = passes.load(self.directory / "model.onnx")
        passes.branch(model, passes.find_sites(model, covered, self.weights))
        file = self.directory / "switchable.onnx"
        passes.save_graph(model, file)
        passes.check(file)
        return Switchable(_session(file), covered, dict(changes), self.x.numpy())

    def merged(self, adapter: Adapter) -> Array:
        """The output of the graph with an adapter in its weights."""
        adapter.check_mode("merged")
        adapter = adapter.settled(self.modules)
        check_modules(adapter, self.modules, "the module")
        check_copies(adapter, self.weights, ())
        changes = parameter_changes(adapter, self.modules, ())
        owners = {path.rpartition(".")[0] for path in changes} & set(self.modules)
        model = passes.load(self.directory / "model.onnx")
        layers = {path: SiteEntry.of(self.modules[path]) for path in sorted(owners)}
        sites = passes.find_sites(model, layers, self.weights)
        passes.merge(model, sites, changes, self.weights)
        file = self.directory / "merged.onnx"
        passes.save_with_data(model, file)
        passes.check(file)
        found: Array = _session(file).run(None, {"x": self.x.numpy()})[0]
        return found


@dataclass(frozen=True)
class Switchable:
    """A graph with branches, and adapters for it."""

    session: ort.InferenceSession
    sites: dict[str, SiteEntry]
    changes: dict[str, Change]
    x: Array

    def tensors(self, name: str) -> dict[str, Array]:
        """An adapter's graph inputs, as its file has them."""
        return graph_tensors(self.changes[name], self.sites)

    def run(self, feeds: Mapping[str, Array]) -> Array:
        """All rows with the same inputs."""
        found: Array = self.session.run(None, {"x": self.x, **feeds})[0]
        return found

    def off(self) -> Array:
        """Without any adapter."""
        return self.run(graph_tensors({}, self.sites))

    def mixed(self, rows: Sequence[AdapterArgument], x: Array) -> Array:
        """A choice for each row, bound as the runtime does."""
        entry = SimpleNamespace(alone="", invocation=())
        bundle: Any = SimpleNamespace(
            manifest=SimpleNamespace(mode="switchable"), adapter=lambda _: entry
        )
        active = ActiveAdapters(bundle, Tensors(self.sites))
        for name in self.changes:
            active.override(name, self.tensors(name))
        choices: Any = list(rows)
        values = active.binding(choices, len(x)).values
        feeds = {"x": ort.OrtValue.ortvalue_from_numpy(x), **values}
        found: Array = self.session.run_with_ort_values(None, feeds)[0].numpy()
        return found


def _session(file: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def make_custom_adapter(
    model: nn.Module, directory: Path, settings: Mapping[str, Any], seed: int = 1
) -> Path:
    """An adapter on a copy of a module, everything that it carries away from its neutral value."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **settings})
    carried = ["modules_to_save", "magnitude", "trainable_tokens_delta", ".bias"]
    if isinstance(config.init_lora_weights, str):
        carried += ["lora_A", "lora_B"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(copy.deepcopy(model), config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                frozen = not parameter.requires_grad and "lora_" not in name
                if not frozen and any(mark in name for mark in carried):
                    size = max(float(parameter.std()) if parameter.numel() > 1 else 0.0, 0.3)
                    parameter.add_(torch.randn_like(parameter) * 0.3 * size)
        adapted.save_pretrained(directory)
    return directory


def load(directory: Path) -> Adapter:
    """The adapter as lora-edge reads it."""
    return lora_edge.load_adapter(directory)


def error_and_effect(got: Array, expected: Array, base: Array) -> tuple[float, float]:
    """max |error| and max |effect|."""
    return float(np.abs(got - expected).max()), float(np.abs(expected - base).max())
