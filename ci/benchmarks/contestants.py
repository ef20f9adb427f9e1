"""Whoever takes part: a graph in our decoding loop, or a PyTorch model in eager mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from prepare import Graphs
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from lora_edge.adapter.load import load_adapter
from lora_edge.bundle.part import Part, SiteEntry
from lora_edge.maths.lora import SiteChange
from lora_edge.runtime.adapters.binding import Binding
from lora_edge.runtime.decoder import Decoder
from lora_edge.runtime.pinned import merged_values
from lora_edge.runtime.session import Fixed

REFERENCE, AGAIN = "genai", "genai again"
MERGED, ON, OFF = "merged", "switchable on", "switchable off"
ON_PINNED, OFF_PINNED = "on, pinned", "off, pinned"
PEFT, EAGER = "PEFT eager", "PyTorch eager"
WITHOUT_ADAPTER = (OFF, OFF_PINNED, EAGER)


_STATE = (("bench", 1.0),)


class Contestant(Protocol):
    """Something that decodes one sequence token by token."""

    def start(self, prompt: list[int], length: int) -> NDArray[np.float32]:
        """Run a prompt with a new cache of ``length`` positions; logits ``[vocab]``."""

    def step(self, token: int) -> NDArray[np.float32]:
        """Append one token; logits ``[vocab]``."""


class Graph:
    """A decoder graph in ONNX Runtime: IO binding, one shared buffer for the KV cache."""

    def __init__(
        self,
        path: Path,
        part: Part,
        threads: int,
        sites: dict[str, SiteEntry] | None = None,
        adapter: Path | None = None,
        fixed: Fixed | None = None,
    ) -> None:
        own = replace(part, file=path.name, sites=sites or {})
        self._decoder = Decoder(path.parent, {"decoder": own}, threads=threads, fixed=fixed)
        self._binding: Binding | None = None
        if adapter is not None:
            tensors, changes = self._decoder.tensors, _changes(adapter)
            values = tensors.changes(changes, [changes])
            self._binding = Binding((_STATE,), {**values, **tensors.weight(1.0)})

    def start(self, prompt: list[int], length: int) -> NDArray[np.float32]:
        self._decoding = self._decoder.start(1, length, self._binding)
        return self._decoding.prefill([prompt])[0]

    def step(self, token: int) -> NDArray[np.float32]:
        return self._decoding.step([token])[0]


class Eager:
    """Hugging Face's model in PyTorch, with its own growing cache."""

    def __init__(self, base: Path, adapter: Path | None = None) -> None:
        model: PreTrainedModel | PeftModel = AutoModelForCausalLM.from_pretrained(base)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        self._model = model.eval()

    def start(self, prompt: list[int], length: int) -> NDArray[np.float32]:  # noqa: ARG002
        self._cache = DynamicCache(config=self._model.config)
        return self._forward(prompt)

    def step(self, token: int) -> NDArray[np.float32]:
        return self._forward([token])

    @torch.inference_mode()
    def _forward(self, tokens: list[int]) -> NDArray[np.float32]:
        logits = self._model(
            input_ids=torch.tensor([tokens]),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[0, -1].numpy()


def _changes(adapter: Path) -> dict[str, SiteChange]:
    modules = load_adapter(adapter, "bench").modules
    return {path: SiteChange(module.factors()) for path, module in modules.items()}


def _pinned(graphs: Graphs, changes: dict[str, SiteChange]) -> Fixed:
    data = graphs.plain.with_name("model.onnx_data")
    return Fixed(_STATE, merged_values(data, graphs.sites, changes))


def makers(graphs: Graphs, threads: int) -> dict[str, Callable[[], Contestant]]:
    """How each contestant is made, by name; genai's only where its graph is."""
    found: dict[str, Callable[[], Contestant]] = {
        MERGED: lambda: Graph(graphs.merged, graphs.part, threads),
        ON: lambda: Graph(graphs.switchable, graphs.part, threads, graphs.sites, graphs.adapter),
        OFF: lambda: Graph(graphs.switchable, graphs.part, threads, graphs.sites),
        ON_PINNED: lambda: Graph(
            graphs.plain, graphs.part, threads, fixed=_pinned(graphs, _changes(graphs.adapter))
        ),
        OFF_PINNED: lambda: Graph(graphs.plain, graphs.part, threads, fixed=Fixed((), {})),
        PEFT: lambda: Eager(graphs.base, graphs.adapter),
        EAGER: lambda: Eager(graphs.base),
    }
    genai = graphs.genai
    if genai is not None:
        for name in (REFERENCE, AGAIN):
            found[name] = lambda: Graph(genai, graphs.genai_part, threads)
    return found
