"""llama.cpp through llama-cpp-python: a GGUF file, and a LoRA's as ``--lora`` takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.bench.players.player import Adapters, Player, Rows
from lora_edge.errors import ProviderError


class LlamaCppPlayer(Player):
    """llama.cpp, one sequence at a time.

    Given: ``file``, the GGUF of the model; ``lora``, that of an adapter, or nothing; ``room``, the
    positions of its cache.
    """

    package = "llama-cpp-python"

    def imports(self) -> None:
        import llama_cpp

        self._library = llama_cpp

    def open(self) -> None:
        self._model = self._library.Llama(
            self.given["file"],
            n_ctx=int(self.given["room"]),
            n_batch=512,
            n_threads=self.threads,
            n_threads_batch=self.threads,
            lora_path=self.given.get("lora"),
            verbose=False,
        )

    def start(self, key: str, rows: Rows, adapters: Adapters, room: int) -> None:  # noqa: ARG002
        if len(rows) > 1:
            raise ProviderError("llama.cpp takes part with one row only", "Leave --only batch out.")
        self._model.reset()
        self._model.eval(list(rows[0]))
        self._logits[key] = self._last()

    def step(self, key: str, tokens: Sequence[int]) -> None:  # noqa: ARG002
        self._model.eval(list(tokens))
        self._last()

    def _last(self) -> NDArray[Any]:
        pointer = self._library.llama_get_logits_ith(self._model.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(self._model.n_vocab(),)).copy()

    def drop(self, key: str) -> None:
        super().drop(key)
        self._model.reset()
