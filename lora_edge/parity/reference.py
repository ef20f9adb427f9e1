"""The reference: Hugging Face's eager model with PEFT's unmerged forward, on the CPU.

The only file of this package that imports torch, transformers or peft. Each row runs alone and
unpadded, so that no batching, padding or cache of PyTorch's can be part of what is compared. PEFT's
own merge is not used: it is wrong for tied embeddings.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.base import Base
from lora_edge.errors import BaseModelError, MissingDependencyError
from lora_edge.parity.states import State


@dataclass(frozen=True)
class Greedy:
    """A greedy continuation.

    Attributes:
        tokens: the new token ids.
        margins: at each step, how far the best logit was above the second.
    """

    tokens: tuple[int, ...]
    margins: tuple[float, ...]


class Reference:
    """A base model in PyTorch, float32, eager attention, with PEFT adapters attached by name."""

    def __init__(self, base: Base) -> None:
        """Load the model.

        Raises:
            MissingDependencyError: torch, transformers or peft is not installed.
            BaseModelError: transformers cannot load the folder.
        """
        try:
            import peft
            import torch
            import transformers
        except ImportError as error:
            raise MissingDependencyError(
                f"checking against PyTorch needs {error.name}",
                "Install it with: pip install 'lora-edge[export]'.",
            ) from error
        self._torch = torch
        self._names: dict[str, str] = {}
        self.base = base
        self.versions = {
            "torch": str(torch.__version__),
            "transformers": str(transformers.__version__),
            "peft": str(peft.__version__),
        }
        with _quiet():
            try:
                # A config of its own: a capture that swaps the attention must not reach this one.
                config = transformers.AutoConfig.from_pretrained(base.directory)
                if hasattr(config, "_experts_implementation"):
                    # The model's own loop; the grouped operator does not exist in float64.
                    config._experts_implementation = "eager"
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    base.directory,
                    config=config,
                    dtype=torch.float32,
                    attn_implementation="eager",
                )
            except Exception as error:  # transformers' loaders raise whatever their parts raise
                raise BaseModelError(
                    f"transformers cannot load {base.name_or_path}: {error}",
                    "Check the folder with AutoModelForCausalLM.from_pretrained.",
                ) from error
        self._model: Any = model.eval()

    @property
    def parameters(self) -> int:
        """Number of the base model's parameters, adapters included once attached."""
        return sum(int(parameter.numel()) for parameter in self._model.parameters())

    def attach(self, name: str, directory: str | os.PathLike[str]) -> None:
        """Load a PEFT directory under ``name``; it is inactive until a state asks for it."""
        from peft import PeftModel

        # PEFT's adapter names are module names, which must not have dots.
        inner = f"adapter{len(self._names)}"
        with _quiet():
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(os.fspath(directory), adapter_name=inner)
            else:
                self._model = PeftModel.from_pretrained(
                    self._model, os.fspath(directory), adapter_name=inner
                ).eval()
        self._names[name] = inner

    def logits(
        self, rows: Sequence[Sequence[int]], states: Sequence[State]
    ) -> list[NDArray[np.floating]]:
        """Logits of every position, each row alone.

        Args:
            rows: token ids.
            states: what is active on each row.

        Returns:
            ``[len, vocab]`` per row; float32, or float64 inside :meth:`wide`.
        """
        found: list[NDArray[np.floating]] = []
        for row, state in zip(rows, states, strict=True):
            with self._torch.inference_mode(), self._active(state):
                ids = self._torch.tensor([list(row)], dtype=self._torch.int64)
                found.append(self._model(input_ids=ids, use_cache=False).logits[0].numpy())
        return found

    def greedy(self, rows: Sequence[Sequence[int]], state: State, steps: int) -> list[Greedy]:
        """Greedy continuations with the cache, each row alone, end-of-text tokens included."""
        found: list[Greedy] = []
        for row in rows:
            tokens: list[int] = []
            margins: list[float] = []
            feed, cache = list(row), None
            with self._torch.inference_mode(), self._active(state):
                for _ in range(steps):
                    ids = self._torch.tensor([feed], dtype=self._torch.int64)
                    out = self._model(input_ids=ids, past_key_values=cache, use_cache=True)
                    best = out.logits[0, -1].topk(2)
                    cache, feed = out.past_key_values, [int(best.indices[0])]
                    tokens += feed
                    margins.append(float(best.values[0] - best.values[1]))
            found.append(Greedy(tuple(tokens), tuple(margins)))
        return found

    @contextlib.contextmanager
    def wide(self) -> Iterator[None]:
        """Run in float64 inside the block; the weights come back unchanged.

        Parts that the model itself computes in float32 (its norms, its softmax) stay so.
        """
        self._model.double()
        try:
            yield
        finally:
            self._model.float()

    @contextlib.contextmanager
    def _active(self, state: State) -> Iterator[None]:
        if not self._names:
            yield
            return
        if not state:
            with self._model.disable_adapter():
                yield
            return
        weights = {self._names[name]: weight for name, weight in state}
        self._model.base_model.set_adapter(list(weights))
        with _scaled(self._model, weights):
            yield


@contextlib.contextmanager
def _scaled(model: Any, weights: Mapping[str, float]) -> Iterator[None]:
    """Scale each adapter's effect: PEFT multiplies every delta by its layer's ``scaling[name]``."""
    from peft.tuners.lora import LoraLayer

    changed: list[tuple[dict[str, float], str, float]] = []
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, weight in weights.items():
                if weight != 1.0 and name in module.scaling:
                    changed.append((module.scaling, name, module.scaling[name]))
                    module.scaling[name] *= weight
    try:
        yield
    finally:
        for scaling, name, value in changed:
            scaling[name] = value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no advice from the loaders; errors are raised all the same."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
