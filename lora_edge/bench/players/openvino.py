"""OpenVINO GenAI: a folder that optimum-intel wrote, in its own loop, with its own adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.bench.players.player import Adapters, Player, Rows
from lora_edge.errors import ProviderError

_EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}


class OpenvinoPlayer(Player):
    """OpenVINO GenAI's pipeline, a token at a time; it chooses its tokens itself, greedily.

    Given: ``folder``; ``exact``: compute and keep the cache in float32, else as OpenVINO chooses
    for this processor; ``lora``, the safetensors file of an adapter, or nothing; ``alpha``, what
    its delta is multiplied by; ``room``, the longest prompt.
    """

    package = "openvino-genai"

    def imports(self) -> None:
        import openvino
        import openvino_genai

        self._ov, self._genai = openvino, openvino_genai

    def open(self) -> None:
        scheduler = self._genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = int(self.given["room"])
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": self.threads}
        if self.given["exact"]:
            options |= _EXACT
        self._adapters = None
        if self.given.get("lora"):
            adapter = self._genai.Adapter(self.given["lora"])
            self._adapters = self._genai.AdapterConfig(adapter, self.given["alpha"])
            options["adapters"] = self._adapters
        self._pipeline = self._genai.ContinuousBatchingPipeline(
            self.given["folder"], scheduler, "CPU", options
        )
        self._count = 0
        if self._adapters is not None:
            # Requests that are stepped through use the adapter that was generated with last.
            self._pipeline.generate([self._ids([0])], [self._config(1)])

    def _ids(self, tokens: Sequence[int]) -> Any:
        return self._ov.Tensor(np.asarray([tokens], np.int64))

    def _config(self, count: int, probabilities: int = 0) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = count
        config.ignore_eos = True  # the tokens mean nothing
        config.do_sample = False
        config.logprobs = probabilities
        if self._adapters is not None:
            config.adapters = self._adapters
        return config

    def _add(self, tokens: Sequence[int], config: Any) -> Any:
        self._count += 1
        return self._pipeline.add_request(self._count, self._ids(tokens), config)

    def start(self, key: str, rows: Rows, adapters: Adapters, room: int) -> None:  # noqa: ARG002
        for other in tuple(self._batches):  # a step would run them too
            self.drop(other)
        handles = [self._add(row, self._config(room)) for row in rows]
        self._batches[key] = handles, rows[0]
        self._step(handles)

    def step(self, key: str, tokens: Sequence[int]) -> None:  # noqa: ARG002
        self._step(self._batches[key][0])

    def _step(self, handles: Sequence[Any]) -> list[Any]:
        """One token of each; what was read of them."""
        self._pipeline.step()
        if not all(handle.can_read() for handle in handles):
            raise ProviderError(
                "OpenVINO GenAI has made no token in a step",
                "Ask for fewer tokens, or leave openvino out.",
            )
        return [handle.read() for handle in handles]

    def logits(self, key: str) -> NDArray[Any] | None:  # noqa: ARG002  it gives none
        return None

    def first(self, key: str) -> tuple[int, float]:
        handle = self._add(self._batches[key][1], self._config(1, 1))
        (read,) = self._step([handle])
        (found,) = read.values()
        return int(found.generated_ids[0]), float(found.generated_log_probs[0])

    def drop(self, key: str) -> None:
        for handle in self._batches.get(key, ((), ()))[0]:
            handle.cancel()
        super().drop(key)
