"""Hugging Face's model in PyTorch, with PEFT's adapters on it; and optimum's ONNX session."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.bench.players.player import Adapters, Player, Rows


class PeftPlayer(Player):
    """PyTorch, eager, with the cache of transformers; a mixed batch by PEFT's ``adapter_names``.

    Given: ``base``, a folder or hub id; ``peft``, name -> PEFT folder.
    """

    package = "lora-edge[export]"

    _model: Any

    def imports(self) -> None:
        import peft  # noqa: F401
        import torch
        import transformers

        self._torch = torch
        transformers.utils.logging.disable_progress_bar()

    def open(self) -> None:
        from transformers import AutoModelForCausalLM

        self._begin()
        self._model = AutoModelForCausalLM.from_pretrained(self.given["base"])
        self._model.eval()

    def _begin(self) -> None:
        self._torch.set_num_threads(self.threads)
        self._peft: dict[str, str] = dict(self.given.get("peft") or {})
        self._loaded: set[str] = set()

    def load(self, adapter: str) -> None:
        if adapter in self._loaded:
            return
        if self._loaded:
            self._model.load_adapter(self._peft[adapter], adapter)
        else:
            from peft import PeftModel

            self._model = PeftModel.from_pretrained(self._model, self._peft[adapter], adapter)
            self._model.eval()
        self._loaded.add(adapter)

    def start(self, key: str, rows: Rows, adapters: Adapters, room: int) -> None:  # noqa: ARG002
        for name in adapters:
            if name is not None:
                self.load(name)
        self._batches[key] = self._cache(), tuple(adapters)
        self._logits[key] = self._forward(key, rows)

    def _cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)

    def step(self, key: str, tokens: Sequence[int]) -> None:
        self._forward(key, [[token] for token in tokens])

    def _forward(self, key: str, rows: Rows) -> NDArray[Any]:
        cache, adapters = self._batches[key]
        given: dict[str, Any] = {"logits_to_keep": 1}
        if len(set(adapters)) > 1:
            given["adapter_names"] = [name or "__base__" for name in adapters]
        elif adapters[0] is not None:
            self._model.set_adapter(adapters[0])
        with self._torch.inference_mode():
            out = self._model(
                input_ids=self._torch.tensor(rows), past_key_values=cache, use_cache=True, **given
            )
        return np.asarray(out.logits[0, -1].float().numpy())


class OptimumPlayer(PeftPlayer):
    """``ORTModelForCausalLM`` of optimum-onnx, which has no adapters.

    Given: ``base``: a model's folder, exported when it is opened, or a folder that optimum wrote.
    """

    package = "lora-edge[optimum]"

    def imports(self) -> None:
        import optimum.onnxruntime
        import torch

        self._torch = torch
        self._made = optimum.onnxruntime.ORTModelForCausalLM

    def open(self) -> None:
        import onnxruntime

        self._begin()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        self._model = self._made.from_pretrained(self.given["folder"], session_options=options)

    def _cache(self) -> Any:
        return None

    def _forward(self, key: str, rows: Rows) -> NDArray[Any]:
        cache, adapters = self._batches[key]
        ids = self._torch.tensor(rows)
        past = 0 if cache is None else cache[0][0].shape[2]
        with self._torch.inference_mode():
            out = self._model(
                input_ids=ids,
                attention_mask=self._torch.ones((len(rows), past + ids.shape[1]), dtype=ids.dtype),
                past_key_values=cache,
                use_cache=True,
            )
        self._batches[key] = out.past_key_values, adapters
        return np.asarray(out.logits[0, -1].numpy())
