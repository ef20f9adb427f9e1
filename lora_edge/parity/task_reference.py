"""The reference for models without a cache: eager transformers and PEFT, on the CPU.

Beside ``reference``, the only file of this package that imports torch, transformers or peft. Each
row runs alone and unpadded. Each adapter has a model of its own, because each brings a head of its
own size; those that bring none stand together in one more, if they are blended.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.adapter.directory import read_config
from lora_edge.base.checkpoint import Base
from lora_edge.parity.plan.states import BASE, State, state_of
from lora_edge.parity.reference import (
    LOGITS,
    attached,
    libraries,
    listened,
    once,
    ran,
    running,
    scaled,
    stands_apart,
)
from lora_edge.tasks.task import Task

Row = Mapping[str, NDArray[Any]]
"""One row's inputs by name, without the batch's axis: ``[seq] int64``, or images or speech."""
Chosen = str | Mapping[str, float] | None
"""What is active: an adapter, adapters with their weights, or nothing."""


class TaskReference:
    """A base model in PyTorch, float32, eager attention, and one more for each adapter."""

    def __init__(self, base: Base, task: Task) -> None:
        """Load the model.

        Raises:
            MissingDependencyError: torch, transformers or peft is not installed.
            BaseModelError: transformers cannot load the folder, or it lacks more than the head.
        """
        self._torch, self.versions = libraries()
        self.base = base
        self.task = task
        self._models: dict[State, Any] = {BASE: _load(base, task)}
        self._blendable: dict[str, Path] = {}
        # All that can be blended, in one model; made when a blend is first asked for.
        self._together: Any = None
        self._wide = False

    @property
    def label_layer(self) -> str:
        """Module path of the layer that makes the labels; empty where there is none."""
        return self.task.label_layer(self._models[BASE])

    @property
    def parameters(self) -> int:
        """Number of the base model's parameters."""
        return sum(int(parameter.numel()) for parameter in self._models[BASE].parameters())

    def attach(
        self, name: str, directory: str | os.PathLike[str], num_labels: int | None = None
    ) -> None:
        """Load a PEFT directory under ``name``, on a model whose head has ``num_labels`` labels.

        Raises:
            BaseModelError: as the constructor.
            AdapterError: PEFT cannot load the directory.
        """
        task = Task(self.task.name, num_labels, self.task.heads)
        model = attached(_load(self.base, task), directory, "default")
        self._models[state_of(name)] = self._callable(model)
        if not stands_apart(read_config(Path(directory))):
            self._blendable[name] = Path(directory)

    def can_blend(self, name: str) -> bool:
        """Whether PEFT can have the adapter active beside another, or at another weight."""
        return name in self._blendable

    def outputs(
        self, rows: Sequence[Row], adapter: Chosen = None, *, low_rank: bool = True
    ) -> list[NDArray[np.floating]]:
        """The task's output for each row alone.

        Args:
            rows: inputs.
            adapter: what is active; ``None``: the base with its own head. Several, or one at
                another weight than 1, must be such that :meth:`can_blend`.
            low_rank: ``False`` switches the low-rank parts off and keeps the adapter's head: what
                the adapter's effect is measured against.

        Returns:
            ``[labels]``, ``[seq, labels]`` (of an encoder-decoder ``[decoder's seq, vocab]``) or
            ``[seq, hidden]`` per row; float32, or float64 inside
            :meth:`wide`.
        """
        found = []
        with self._active(adapter) as model, contextlib.ExitStack() as stack:
            stack.enter_context(self._torch.inference_mode())
            if not low_rank:
                stack.enter_context(_without_low_rank(model))
            for row in rows:
                found.append(self._output(model, row))
        return found

    def module_outputs(
        self, row: Row, adapter: Chosen, paths: Iterable[str]
    ) -> dict[str, NDArray[np.floating]]:
        """What modules of the model give for one row, alone.

        Args:
            row: inputs.
            adapter: as for :meth:`outputs`.
            paths: module paths of the base model; those that it lacks, or that it calls more than
                once or never, are not in the result.

        Returns:
            module path -> the module's output without the batch's axis, float32, or float64 inside
            :meth:`wide`; and the task's output by the name
            :data:`~lora_edge.parity.reference.LOGITS`.
        """
        with self._active(adapter) as model, self._torch.inference_mode():
            inner = model.get_base_model() if hasattr(model, "get_base_model") else model
            with listened(inner, paths) as found:
                output = self._output(model, row)
        return {**once(found), LOGITS: output}

    def called(self, row: Row, adapter: Chosen) -> list[str]:
        """The modules with weights of their own, in the order in which they run on a row."""
        with self._active(adapter) as model, self._torch.inference_mode():
            inner = model.get_base_model() if hasattr(model, "get_base_model") else model
            with ran(inner) as found:
                self._output(model, row)
        return found

    @contextlib.contextmanager
    def _active(self, adapter: Chosen) -> Iterator[Any]:
        """The model in which a state is active."""
        state = state_of(adapter)
        if state in self._models:
            with running(state):
                yield self._models[state]
            return
        fixed = [name for name, _ in state if name not in self._blendable]
        if fixed:
            raise ValueError(f"PEFT cannot blend or weight {fixed[0]}")
        if self._together is None:
            self._together = self._attached_together()
        # PEFT's adapter names are module names, which must not have dots.
        places = {name: f"adapter{index}" for index, name in enumerate(self._blendable)}
        weights = {places[name]: weight for name, weight in state}
        self._together.base_model.set_adapter(list(weights))
        with scaled(self._together, weights), running(state):
            yield self._callable(self._together)

    def _attached_together(self) -> Any:
        model = _load(self.base, self.task)
        for index, directory in enumerate(self._blendable.values()):
            model = attached(model, directory, f"adapter{index}")
        return model.double() if self._wide else model

    def _callable(self, model: Any) -> Any:
        # PEFT's own forward gives input_ids to models of speech too.
        return (model.base_model if self.task.seq2seq else model).eval()

    def _output(self, model: Any, row: Row) -> NDArray[np.floating]:
        dtype = next(model.parameters()).dtype
        feeds = {name: self._torch.from_numpy(array)[None] for name, array in row.items()}
        for key, value in feeds.items():
            feeds[key] = value.to(dtype) if value.is_floating_point() else value
        # PEFT's own forward gives some models arguments that they do not take (CLIP's text model).
        wrapped = type(model).__module__.startswith("peft.") and not self.task.seq2seq
        called = model.base_model if wrapped else model
        output: NDArray[np.floating] = getattr(called(**feeds), self.task.output)[0].numpy()
        return output

    @contextlib.contextmanager
    def wide(self) -> Iterator[None]:
        """Run in float64 inside the block; the weights come back unchanged.

        Parts that a model itself computes in float32 (its norms, its softmax) stay so.
        """
        self._wide = True
        for model in self._all():
            model.double()
        try:
            yield
        finally:
            self._wide = False
            for model in self._all():
                model.float()

    def _all(self) -> list[Any]:
        return [*self._models.values(), *([] if self._together is None else [self._together])]


def _load(base: Base, task: Task) -> Any:
    # Imports torch, so it waits until libraries() has said that it is there.
    from lora_edge.base.model import load_whole

    return load_whole(base, task, pooler=True)


@contextlib.contextmanager
def _without_low_rank(model: Any) -> Iterator[None]:
    """Switch the low-rank layers off, and leave the modules that the adapter replaces."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
