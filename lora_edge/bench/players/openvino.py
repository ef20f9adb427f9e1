"""OpenVINO: the stateful model that optimum-intel and OpenVINO GenAI share, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.bench.players.player import Adapters, Player, Rows


class OpenvinoPlayer(Player):
    """``openvino_model.xml`` with its cache inside, as OpenVINO GenAI runs it, without adapters.

    Given: ``folder``.
    """

    package = "openvino"

    def imports(self) -> None:
        import openvino

        self._ov = openvino

    def open(self) -> None:
        options = {
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": self.given.get("group", 32),
            "KV_CACHE_PRECISION": "f32",
        }
        model = self._ov.Core().read_model(Path(self.given["folder"]) / "openvino_model.xml")
        self._compiled = self._ov.compile_model(model, "CPU", options)
        self._inputs = {name for x in self._compiled.inputs for name in x.get_names()}

    def start(self, key: str, rows: Rows, adapters: Adapters, room: int) -> None:  # noqa: ARG002
        self._batches[key] = self._compiled.create_infer_request(), 0
        self._logits[key] = self._forward(key, rows)

    def step(self, key: str, tokens: Sequence[int]) -> None:
        self._forward(key, [[token] for token in tokens])

    def _forward(self, key: str, rows: Rows) -> NDArray[Any]:
        request, past = self._batches[key]
        ids = np.asarray(rows, np.int64)
        batch, width = ids.shape
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, past + width), np.int64),
            "position_ids": np.tile(np.arange(past, past + width, dtype=np.int64), (batch, 1)),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        request.infer({name: value for name, value in feeds.items() if name in self._inputs})
        self._batches[key] = request, past + width
        return np.array(request.get_tensor("logits").data[0, -1])
