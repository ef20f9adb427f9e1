"""onnxruntime-genai: a folder with ``genai_config.json``, in its own loop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_edge.bench.players.player import Adapters, Player, Rows
from lora_edge.errors import ProviderError


class GenaiPlayer(Player):
    """onnxruntime-genai's own generator; it chooses its tokens itself, greedily.

    Given: ``folder``; ``adapters``, name -> ``.onnx_adapter``; ``none``, the name of the one that
    stands for no adapter, where the graph has inputs for adapters.
    """

    package = "onnxruntime-genai"

    def imports(self) -> None:
        import onnxruntime_genai

        self._og = onnxruntime_genai

    def open(self) -> None:
        config = self._og.Config(self.given["folder"])
        threads = {"intra_op_num_threads": self.threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self._model = self._og.Model(config)
        self._files: dict[str, str] = dict(self.given.get("adapters") or {})
        self._none: str | None = self.given.get("none")
        self._adapters = self._og.Adapters(self._model) if self._files else None
        self._loaded: set[str] = set()

    def load(self, adapter: str) -> None:
        if adapter not in self._loaded and self._adapters is not None:
            self._adapters.load(self._files[adapter], adapter)
            self._loaded.add(adapter)

    def start(self, key: str, rows: Rows, adapters: Adapters, room: int) -> None:
        self.drop(key)
        generator = self._batches[key] = self._made(adapters, room)
        generator.append_tokens(np.asarray(rows, np.int32))
        self._logits[key] = np.asarray(generator.get_logits()).reshape(len(rows), -1)[0]

    def _made(self, adapters: Adapters, room: int) -> Any:
        params = self._og.GeneratorParams(self._model)
        # The end token must not end it: the tokens mean nothing.
        params.set_search_options(
            max_length=room, min_length=room, do_sample=False, batch_size=len(adapters)
        )
        generator = self._og.Generator(self._model, params)
        names = {name or self._none for name in adapters}
        if len(names) != 1:
            raise ProviderError(
                "onnxruntime-genai has one adapter for a whole batch", "Leave --only batch out."
            )
        (name,) = names
        if name is not None and self._adapters is not None:
            self.load(name)
            generator.set_active_adapter(self._adapters, name)
        return generator

    def step(self, key: str, tokens: Sequence[int]) -> None:  # noqa: ARG002
        self._batches[key].generate_next_token()

    def switch(self, adapters: Adapters, room: int) -> None:
        self._batches["switch"] = self._made(adapters, room)
