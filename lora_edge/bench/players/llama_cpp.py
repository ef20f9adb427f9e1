"""llama.cpp: a GGUF file, and a LoRA's as ``--lora`` takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from lora_edge.bench.players.llama_library import LlamaLibrary, LlamaModel, LlamaSequence
from lora_edge.bench.players.player import Adapters, Player, Rows
from lora_edge.errors import ProviderError


class LlamaCppPlayer(Player):
    """llama.cpp, one sequence at a time.

    Given: ``library``, the folder of its shared libraries; ``file``, the GGUF of the model;
    ``lora``, that of an adapter, or nothing; ``room``, the positions of its cache; ``exact``: the
    logits that are compared are computed once more with attention and cache in float32. What is
    measured is llama.cpp's default, which rounds both to float16.
    """

    package = "llama.cpp"

    def imports(self) -> None:
        self._library = LlamaLibrary(self.given["library"])

    def about(self) -> str:
        return self._library.about()

    def open(self) -> None:
        self._model = LlamaModel(self._library, self.given["file"], self.given.get("lora"))
        self._sequence = self._made(exact=False)

    def _made(self, *, exact: bool) -> LlamaSequence:
        return LlamaSequence(self._model, int(self.given["room"]), self.threads, exact=exact)

    def start(self, key: str, rows: Rows, adapters: Adapters, room: int) -> None:  # noqa: ARG002
        if len(rows) > 1:
            raise ProviderError("llama.cpp takes part with one row only", "Leave --only batch out.")
        self._sequence.clear()
        self._sequence.run(rows[0])
        self._batches[key] = rows[0]
        self._logits[key] = self._sequence.logits()

    def logits(self, key: str) -> NDArray[Any]:
        if self.given["exact"]:
            again = self._made(exact=True)
            again.run(self._batches[key])
            self._logits[key] = again.logits()
            again.close()
        return self._logits[key]

    def step(self, key: str, tokens: Sequence[int]) -> None:  # noqa: ARG002
        self._sequence.run(tokens)
