"""A bundle's graph with fixed shapes by plain ONNX Runtime and numpy, and nothing of lora-edge.

``python static.py [--qnn]``: on the CPU, or on QNN's HTP, with no node left to the CPU. It follows
``docs/bundle-format.md``, "Fixed shapes".
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lora_edge.clients.drivers.plain import STACKED, Arrays, OnnxRuntime, Plain, State, first
else:  # beside this file, which is a program of its own
    from plain import STACKED, Arrays, OnnxRuntime, Plain, State, first

QNN = "QNNExecutionProvider"
# Of the emulator on x86-64, which has no NPU to ask: an NPU of generation 75.
EMULATED = {"soc_model": "69", "htp_arch": "75"}


class Htp(OnnxRuntime):
    """A graph in onnxruntime on QNN's HTP, whole."""

    def __init__(self, path: Path) -> None:
        import onnxruntime as ort
        import onnxruntime_qnn

        ort.register_execution_provider_library(QNN, onnxruntime_qnn.get_library_path())
        devices = [device for device in ort.get_ep_devices() if device.ep_name == QNN]
        if not devices:
            raise ValueError("onnxruntime-qnn finds no device on this machine")
        emulator = platform.machine() == "x86_64"
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        own = {"backend_path": onnxruntime_qnn.get_qnn_htp_path()}
        options.add_provider_for_devices(devices[:1], own | (EMULATED if emulator else {}))
        self.session = ort.InferenceSession(str(path), options, enable_fallback=0)
        if QNN not in self.session.get_providers():
            raise ValueError(f"{QNN} did not start")
        where = "HTP's emulator" if emulator else "HTP"
        self.about = f"onnxruntime {ort.__version__}, onnxruntime-qnn {version('onnxruntime-qnn')}"
        self.about += f", {where}, no node on the CPU"
        self.types = {x.name: x.type for x in self.session.get_inputs()}
        self.names = [x.name for x in self.session.get_outputs()]


class Static(Plain):
    """A bundle, and the rows that are being decoded."""

    def __init__(self, qnn: bool) -> None:
        super().__init__(False, None)
        self.qnn = qnn

    def open(self, bundle: str, graph: str) -> Mapping[str, Any]:
        if self.qnn:
            self.load = Htp
        told = super().open(bundle, graph)
        if (self.part.get("static") or {}).get("file") != graph:
            raise ValueError(f"{graph} is not the bundle's graph with fixed shapes")
        return {"about": told["about"], "can": ["mixed", "blend"]}

    def start(self, states: Sequence[State], sequence: int) -> Mapping[str, Any]:
        (state,) = states
        self.sequences[sequence] = Row(self, state)
        return {}


class Row:
    """One row, with its cache of ``past`` positions."""

    def __init__(self, bundle: Static, state: State) -> None:
        self.graph, self.static = bundle.graph, bundle.part["static"]
        cache, past = bundle.part["cache"], self.static["past"]
        shape = (1, cache["kv_heads"], past, cache["head_dim"])
        names = [x for x in bundle.graph.types if x.startswith("past_key_values.")]
        self.past = {name: np.zeros(shape, np.float32) for name in names}
        self.history: list[int] = []
        self.active, self.adapter = adapted(bundle, state)

    def extend(self, rows: Sequence[Sequence[int]], every: bool) -> list[Any]:
        (row,) = rows
        if not self.history:
            self.begins = first(row, self.active)
        whole, end, found = [*self.history, *row], len(self.history), []
        if len(whole) > self.static["past"] + self.static["seq"]:
            raise ValueError(f"{len(whole)} tokens are more than the graph has room for")
        while end < len(whole):
            kept = min(end, self.static["past"])
            tokens = whole[kept : kept + self.static["seq"]]
            found.append(self.run(kept, tokens)[end - kept :])
            end = kept + len(tokens)
        self.history = whole
        logits = np.concatenate(found)
        return [logits if every else logits[-1:]]

    def run(self, kept: int, tokens: Sequence[int]) -> Any:
        """Tokens behind those in the cache; returns ``[tokens, vocab]``."""
        seq, past, count = self.static["seq"], self.static["past"], len(tokens)
        ids, mask = np.zeros((1, seq), np.int64), np.zeros((1, past + seq), np.int64)
        ids[0, :count] = tokens
        mask[0, :kept] = mask[0, past : past + count] = 1
        positions = np.minimum(np.arange(kept, kept + seq), kept + count - 1)[None]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        gate = (positions >= self.begins).astype(np.float32)[:, :, None]
        given |= {name: gate for name in self.graph.types if name.endswith(".gate")}
        given |= self.past | self.adapter
        found = self.graph.run({name: x for name, x in given.items() if name in self.graph.types})
        room = min(count, past - kept)
        for name, cache in self.past.items():
            new = found[name.replace("past_key_values", "present")]
            cache[:, :, kept : kept + room] = new[:, :, :room]
        return found["logits"][0, :count]


def adapted(bundle: Static, state: State) -> tuple[Sequence[int], Arrays]:
    """The invocation that a row waits for, and its adapter inputs but for the gates.

    A blend is one pair, each B times its weight, and the sum of what is stacked. What is narrower
    than the graph is padded with zeros.
    """
    if bundle.manifest["mode"] == "merged":
        return (), {}
    weights = dict(state) or {"none": 1.0}
    own = [(bundle.adapter(name), np.float32(weight)) for name, weight in weights.items()]
    rank = bundle.part["static"]["rank"]
    fed: Arrays = {"lora.select": np.ones((1, 1, 1), np.float32)}
    for path, site in bundle.part["sites"].items():
        inputs = {part: f"lora.{path}.{part}" for part in site["parts"]}
        if "A" in inputs:
            a = np.concatenate([x[inputs["A"]] for x, _ in own], 1)
            b = np.concatenate([x[inputs["B"]] * weight for x, weight in own], 0)
            if a.shape[1] > rank:
                raise ValueError(f"rank {a.shape[1]} at {path}, and there is room for {rank}")
            fed[inputs["A"]] = np.pad(a, ((0, 0), (0, rank - a.shape[1])))
            fed[inputs["B"]] = np.pad(b, ((0, rank - b.shape[0]), (0, 0)))
        for part in STACKED:
            if part in inputs:
                fed[inputs[part]] = sum(x[inputs[part]] * weight for x, weight in own)
    invoked = [bundle.manifest["adapters"][name]["invocation"] for name in weights]
    return next((x for x in invoked if x), ()), fed


if __name__ == "__main__":
    from talk import talk  # beside this file, which is a program of its own

    parser = argparse.ArgumentParser()
    parser.add_argument("--qnn", action="store_true")
    static = Static(parser.parse_args().qnn)
    talk({order: getattr(static, order) for order in ("open", "start", "extend")})
