"""lora-edge itself, and anyone's decoder graph in its loop."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_edge.bench.players.player import Adapters, Player, Rows
from lora_edge.names import NUM_LOGITS_TO_KEEP

if TYPE_CHECKING:
    from lora_edge.runtime import Runner
    from lora_edge.runtime.decoder import Decoder
    from lora_edge.runtime.decoding import Decoding


class _Ours(Player):
    """What decodes with our loop."""

    @abstractmethod
    def _start(self, adapters: Adapters, room: int) -> Decoding:
        """A batch with nothing in it yet."""

    def start(self, key: str, rows: Rows, adapters: Adapters, room: int) -> None:
        self.drop(key)
        decoding = self._batches[key] = self._start(adapters, room)
        self._logits[key] = decoding.prefill(rows)[0]

    def step(self, key: str, tokens: Sequence[int]) -> None:
        self._batches[key].step(tokens)


class BundlePlayer(_Ours):
    """A bundle in a :class:`~lora_edge.runtime.runner.Runner`.

    Given: ``bundle``, its folder; ``pinned``, names or ``None``; ``first``: the adapter whose
    session belongs to opening, because a Runner opens sessions when they are first needed.
    """

    package = "onnxruntime"

    def imports(self) -> None:
        from lora_edge.runtime import Runner

        self._made = Runner

    def open(self) -> None:
        pinned = self.given.get("pinned", ())
        self._runner: Runner = self._made(self.given["bundle"], threads=self.threads, pinned=pinned)
        for name in pinned or [self.given.get("first")]:
            self._runner.start(name, 1, 1)

    def _start(self, adapters: Adapters, room: int) -> Decoding:
        alike = len(set(adapters)) == 1
        chosen = adapters[0] if alike else list(adapters)
        return self._runner.start(chosen, len(adapters), room)

    def load(self, adapter: str) -> None:
        self._runner.binding(adapter, 1)

    def switch(self, adapters: Adapters, room: int) -> None:
        self._batches["switch"] = self._start(adapters, room)


class GraphPlayer(_Ours):
    """Another exporter's graph of a decoder in our loop.

    Given: ``file``, the graph; ``bundle``, one of the same model, which tells its sizes; ``own``:
    it is one of lora-edge's, without branches.
    """

    package = "onnxruntime"

    def imports(self) -> None:
        import lora_edge.runtime.decoder  # noqa: F401

    def open(self) -> None:
        import dataclasses

        from lora_edge.bundle.bundle import load_bundle
        from lora_edge.runtime.decoder import Decoder

        file = Path(self.given["file"])
        facts = load_bundle(self.given["bundle"]).manifest.parts["decoder"]
        part = dataclasses.replace(facts, file=file.name, sites={})
        if not self.given.get("own"):
            inputs = tuple(name for name in facts.inputs if name != NUM_LOGITS_TO_KEEP)
            part = dataclasses.replace(part, form="foreign", backend="genai", inputs=inputs)
        self._decoder: Decoder = Decoder(file.parent, {"decoder": part}, threads=self.threads)

    def _start(self, adapters: Adapters, room: int) -> Decoding:
        return self._decoder.start(len(adapters), room)
