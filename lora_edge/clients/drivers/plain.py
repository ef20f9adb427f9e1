"""Bundles by plain ONNX Runtime, or by OpenVINO, and numpy: nothing of lora-edge runs here.

``python plain.py [--provider NAME] [--openvino]``. It follows ``docs/bundle-format.md``.
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, Any]
State = Mapping[str, float]

STACKED = ("G", "bias", "weight")
TYPES = {1: np.float32, 10: np.float16}


def read_adapter(path: Path) -> Arrays:
    """The tensors of an ``.onnx_adapter`` file: a FlatBuffer of named tensors."""
    data = path.read_bytes()
    if data[4:8] != b"TORT":
        raise ValueError(f"{path} is not an .onnx_adapter file")

    def number(form: str, at: int) -> int:
        return int(struct.unpack_from(f"<{form}", data, at)[0])

    def field(table: int, index: int) -> int:
        vtable = table - number("i", table)
        at = 4 + 2 * index
        return number("H", vtable + at) if at < number("H", vtable) else 0

    def vector(table: int, index: int) -> tuple[int, int]:
        at = table + field(table, index)
        at += number("I", at)
        return at + 4, number("I", at)

    found = {}
    start, count = vector(number("I", 0), 3)
    for place in range(start, start + 4 * count, 4):
        tensor = place + number("I", place)
        name, length = vector(tensor, 0)
        dims, rank = vector(tensor, 1)
        content, size = vector(tensor, 3)
        shape = [number("q", dims + 8 * i) for i in range(rank)]
        kind = TYPES[number("i", tensor + field(tensor, 2))]
        values = np.frombuffer(data[content : content + size], kind)
        found[data[name : name + length].decode()] = values.reshape(shape)
    return found


class OnnxRuntime:
    """A graph in onnxruntime."""

    def __init__(self, path: Path, provider: str | None) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        wanted = [provider] if provider else []
        missing = [name for name in wanted if name not in ort.get_available_providers()]
        if missing:
            raise ValueError(f"{missing[0]} is not in this onnxruntime {ort.__version__}")
        providers = [*wanted, "CPUExecutionProvider"]
        self.session = ort.InferenceSession(str(path), options, providers=providers)
        self.about = f"onnxruntime {ort.__version__}" + (f", {provider}" if provider else "")
        self.types = {x.name: x.type for x in self.session.get_inputs()}
        self.names = [x.name for x in self.session.get_outputs()]

    def half(self, name: str) -> bool:
        """Whether an input is float16."""
        return "float16" in self.types[name]

    def run(self, feeds: Arrays) -> Arrays:
        return dict(zip(self.names, self.session.run(self.names, feeds), strict=True))


class OpenVino:
    """The same graph in OpenVINO."""

    def __init__(self, path: Path) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(str(path))
        exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        self.request = core.compile_model(
            model, "CPU", {**exact, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        ).create_infer_request()
        self.about = f"openvino {openvino.get_version().split('-')[0]}"
        self.types = {port.get_any_name(): port.element_type for port in model.inputs}
        self.names = [port.get_any_name() for port in model.outputs]

    def half(self, name: str) -> bool:
        """Whether an input is float16."""
        return "f16" in str(self.types[name])

    def run(self, feeds: Arrays) -> Arrays:
        found = self.request.infer(feeds)
        return {name: np.array(found[name]) for name in self.names}


class Plain:
    """A bundle, and the sequences that are being decoded."""

    def __init__(self, openvino: bool, provider: str | None) -> None:
        self.openvino = openvino
        self.load: Any = OpenVino if openvino else partial(OnnxRuntime, provider=provider)

    def open(self, bundle: str, graph: str) -> Mapping[str, Any]:
        self.folder = Path(bundle)
        self.manifest = json.loads((self.folder / "lora_edge.json").read_text(encoding="utf-8"))
        (self.part,) = self.manifest["parts"].values()
        path = self.folder / graph
        self.graph: Any = self.load(path)
        self.inputs = self.graph.types
        adapted = next((name for name in self.inputs if name.startswith("lora.")), "")
        self.dtype = np.float16 if adapted and self.graph.half(adapted) else np.float32
        self.tensors: dict[str, Arrays] = {}
        self.sequences: dict[int, Any] = {}
        # OpenVINO 2026.4 takes one row where attention is fused.
        alone = self.openvino and self.part["form"] == "fused"
        can = ["blend", *(() if alone else ("batch", "mixed", "rests"))]
        return {"about": self.graph.about, "can": can}

    # Adapters.

    def adapter(self, name: str) -> Arrays:
        if name not in self.tensors:
            file = self.manifest["adapters"][name]["file"]
            self.tensors[name] = read_adapter(self.folder / file)
        return self.tensors[name]

    def start(self, states: Sequence[State], sequence: int) -> Mapping[str, Any]:
        self.sequences[sequence] = Decoding(self, states)
        return {}

    def extend(
        self, rows: Sequence[Sequence[int]], every: bool, sequence: int
    ) -> Mapping[str, Any]:
        return {"arrays": self.sequences[sequence].extend(rows, every)}

    def outputs(
        self, rows: Sequence[Mapping[str, Any]], states: Sequence[State]
    ) -> Mapping[str, Any]:
        bound = Bound(self, states)
        feeds: Arrays = {}
        lengths = [len(row.get("input_ids", [])) for row in rows]
        for name in self.part["inputs"]:
            if name == "pixel_values":
                feeds[name] = np.array([row[name] for row in rows], np.float32)
                continue
            fill = self.part["pad_token_id"] if name == "input_ids" else 0
            feeds[name] = np.full((len(rows), max(lengths)), fill, np.int64)
            for line, row in zip(feeds[name], rows, strict=True):
                line[: len(row[name])] = row[name]
        feeds |= bound.adapted(np.zeros((len(rows), 1)), [])
        found = self.graph.run(feeds)[self.part["output"]]
        arrays = []
        for index, (values, length) in enumerate(zip(found, lengths, strict=True)):
            if values.ndim == 1:
                arrays.append(values[: bound.labels[index]] if bound.labels else values)
            else:
                arrays.append(values[: length or None])
        return {"arrays": arrays}


class Bound:
    """What the graph is fed for the states of the rows."""

    def __init__(self, bundle: Plain, states: Sequence[State]) -> None:
        self.bundle, self.manifest = bundle, bundle.manifest
        self.states = [dict(state) for state in states]
        self.gates: list[tuple[str, Sequence[int]]] = []
        self.fixed: Arrays = {}
        self.labels: list[int] = []
        if self.manifest["mode"] == "merged":
            self.names: list[str] = []
            return
        self.names = sorted({name for state in self.states for name in state}) or ["none"]
        own = [self.bundle.adapter(name) for name in self.names]
        for path, site in bundle.part["sites"].items():
            inputs = {part: f"lora.{path}.{part}" for part in site["parts"]}
            if "A" in inputs:
                self.fixed[inputs["A"]] = np.concatenate([x[inputs["A"]] for x in own], 1)
                self.fixed[inputs["B"]] = np.concatenate([x[inputs["B"]] for x in own], 0)
                self.gates.append((inputs["gate"], [x[inputs["A"]].shape[1] for x in own]))
            for part in STACKED:
                if part in inputs:
                    self.fixed[inputs[part]] = np.concatenate([x[inputs[part]] for x in own], 0)
            if "W" in inputs:
                self.heads(inputs)
        if "lora.select" in bundle.inputs:
            self.gates.append(("lora.select", [1] * len(self.names)))
        self.starts: Any = None

    def heads(self, inputs: Mapping[str, str]) -> None:
        """The task head of each row; fewer labels are padded with zeros."""
        entries = self.manifest["adapters"]
        chosen = []
        for state in self.states:
            labelled = [name for name in state if entries[name]["labels"]]
            chosen.append(self.bundle.adapter([*labelled, *state, "none"][0]))
        self.labels = [x[inputs["W"]].shape[2] for x in chosen]
        for part in ("W", "c"):
            tensors = [x[inputs[part]] for x in chosen]
            whole = np.zeros((len(tensors), tensors[0].shape[1], max(self.labels)), np.float32)
            for row, tensor in zip(whole, tensors, strict=True):
                row[:, : tensor.shape[2]] = tensor[0]
            self.fixed[inputs[part]] = whole

    def adapted(self, positions: Any, prompts: Sequence[Sequence[int]]) -> Arrays:
        """Every adapter input, for new tokens at these positions."""
        weights = np.array([[s.get(name, 0.0) for name in self.names] for s in self.states])
        active = weights[:, None, :]
        invocations = [self.manifest["adapters"][name]["invocation"] for name in self.names]
        if any(invocations):
            if self.starts is None:
                self.starts = np.array([[first(r, i) for i in invocations] for r in prompts])
            active = active * (positions[:, :, None] >= self.starts[:, None, :])
        feeds = {name: np.repeat(active, ranks, axis=2) for name, ranks in self.gates}
        return {name: x.astype(self.bundle.dtype) for name, x in (self.fixed | feeds).items()}


class Decoding:
    """The sequences of one batch, with their cache."""

    def __init__(self, bundle: Plain, states: Sequence[State]) -> None:
        self.bound, self.graph, self.part = Bound(bundle, states), bundle.graph, bundle.part
        cache = self.part["cache"]
        dtype = np.float16 if self.graph.half("past_key_values.0.key") else np.float32
        empty = np.zeros((len(states), cache["kv_heads"], 0, cache["head_dim"]), dtype)
        layers, parts = range(cache["layers"]), ("key", "value")
        self.past = {f"past_key_values.{n}.{part}": empty for n in layers for part in parts}
        self.history: list[list[int]] = [[] for _ in states]
        self.mask = np.zeros((len(states), 0), np.int64)
        self.prompts: Any = None

    def extend(self, rows: Sequence[Sequence[int]], every: bool) -> list[Any]:
        self.prompts = self.prompts or rows
        width = max(map(len, rows))
        if self.part["form"] == "fused" and any(self.history) and width > 1 and len(rows) > 1:
            raise ValueError("a fused graph takes one new token for each row behind a past")
        return (self.fused if self.part["form"] == "fused" else self.joined)(rows, every)

    def fused(self, rows: Sequence[Sequence[int]], every: bool) -> list[Any]:
        """Rows are padded on the right; one that rests writes its last token again."""
        fed = [list(row) or old[-1:] for row, old in zip(rows, self.history, strict=True)]
        totals = [len(old) + len(row) for row, old in zip(rows, self.history, strict=True)]
        mask = (np.arange(max(totals)) < np.array(totals)[:, None]).astype(np.int64)
        return self.run(rows, fed, totals, [0] * len(rows), mask, every)

    def joined(self, rows: Sequence[Sequence[int]], every: bool) -> list[Any]:
        """Past in, past and new out; gaps between a row's tokens are masked."""
        width = max(map(len, rows))
        left = self.part["padding"] == "left"
        begins = [width - len(row) if left else 0 for row in rows]
        new = np.zeros((len(rows), width), np.int64)
        for line, row, begin in zip(new, rows, begins, strict=True):
            line[begin : begin + len(row)] = 1
        self.mask = np.concatenate([self.mask, new], 1)
        totals = [len(old) + len(row) for row, old in zip(rows, self.history, strict=True)]
        return self.run(rows, [list(row) for row in rows], totals, begins, self.mask, every)

    def run(
        self,
        rows: Sequence[Sequence[int]],
        fed: Sequence[Sequence[int]],
        totals: Sequence[int],
        begins: Sequence[int],
        mask: Any,
        every: bool,
    ) -> list[Any]:
        width = max(map(len, fed))
        ids = np.zeros((len(rows), width), np.int64)
        positions = np.zeros((len(rows), width), np.int64)
        for index, (row, total, begin) in enumerate(zip(fed, totals, begins, strict=True)):
            ids[index, begin : begin + len(row)] = row
            places = np.arange(width) - begin + total - len(row)
            positions[index] = np.clip(places, 0, max(total - 1, 0))
        kept = np.array(0, np.int64)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        given |= {"num_logits_to_keep": kept} | self.past
        given |= self.bound.adapted(positions, self.prompts)
        found = self.graph.run({name: x for name, x in given.items() if name in self.graph.types})
        self.past = {name: found[name.replace("past_key_values", "present")] for name in self.past}
        for old, row in zip(self.history, rows, strict=True):
            old.extend(row)
        logits = []
        for values, row, begin in zip(found["logits"], rows, begins, strict=True):
            end = begin + max(len(row), 1)
            logits.append(values[begin if every else end - 1 : end])
        return logits


def first(row: Sequence[int], invocation: Sequence[int]) -> int:
    """Where an invocation stands last in a prompt: its adapter is active from there on."""
    for start in range(len(row) - len(invocation), -1, -1):
        if list(row[start : start + len(invocation)]) == list(invocation):
            return start if invocation else 0
    return 1 << 60


if __name__ == "__main__":
    from talk import talk  # beside this file, which is a program of its own

    parser = argparse.ArgumentParser()
    parser.add_argument("--provider")
    parser.add_argument("--openvino", action="store_true")
    asked = parser.parse_args()
    plain = Plain(asked.openvino, asked.provider)
    orders = ("open", "start", "extend", "outputs")
    talk({order: getattr(plain, order) for order in orders})
