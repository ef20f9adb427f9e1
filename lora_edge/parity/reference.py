"""The reference: Hugging Face's eager model with PEFT's unmerged forward, on the CPU.

Beside ``peft_models`` and ``around/reference``, the only file of this package that imports torch,
transformers or peft.
Each row runs alone and unpadded, so that no batching, padding or cache of PyTorch's can be part of
what is compared. PEFT's own merge is not used: it is wrong for tied embeddings.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.adapter.directory import read_config
from lora_edge.base.checkpoint import Base
from lora_edge.errors import MissingDependencyError, OptionError
from lora_edge.maths.quantization import Quantization
from lora_edge.parity.peft_models import (
    attached,
    base_of,
    is_peft,
    listened,
    once,
    ran,
    running,
    scaled,
    stands_apart,
    widened,
    without_low_rank,
)
from lora_edge.parity.plan.states import BASE, Inputs, State
from lora_edge.tasks.task import TEXT, Task

if TYPE_CHECKING:
    from lora_edge.parity.by_layer import ByLayer

LOGITS = ""
"""The path of the model itself, among those of its modules."""

_KEPT = 50_000_000  # parameters of models that are kept for adapters that stand apart


@dataclass(frozen=True)
class Greedy:
    """A greedy continuation.

    Attributes:
        tokens: the new token ids.
        margins: at each step, how far the best logit was above the second.
    """

    tokens: tuple[int, ...]
    margins: tuple[float, ...]


def libraries() -> tuple[Any, dict[str, str]]:
    """torch, and the versions of torch, transformers and peft.

    Raises:
        MissingDependencyError: one of them is not installed.
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
    return torch, {
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "peft": str(peft.__version__),
    }


class Reference:
    """A base model in PyTorch, float32, eager attention, with PEFT adapters attached by name."""

    def __init__(
        self, base: Base, task: Task = TEXT, quantization: Quantization | None = None
    ) -> None:
        """Load the model.

        Args:
            base: the model's folder.
            task: what it is to do.
            quantization: round the weights of these layers first.

        Raises:
            MissingDependencyError: torch, transformers or peft is not installed.
            BaseModelError: transformers cannot load the folder, or it lacks more than the head.
        """
        self._torch, self.versions = libraries()
        from lora_edge.base.mapped import Mapped  # these import torch
        from lora_edge.parity.by_layer import WHOLE, ByLayer

        self.base = base
        self.task = task
        self._quantization: Quantization | None = None
        self._large = base.size > WHOLE
        self._shared: Any = self._load(task, stored=self._large)
        # How a large model runs, and one that an adapter has for itself.
        self.mapped = Mapped(self._shared, base.files)
        self._by_layer = ByLayer(self.mapped)
        self._by_layer_apart: dict[str, ByLayer] = {}
        self._size = sum(int(parameter.numel()) for parameter in self._shared.parameters())
        self.label_layer: str = task.label_layer(self._shared)
        self.architecture = type(self._shared).__name__
        # What ends with the block of wide(), and the models that are float64 in it.
        self._widening: contextlib.ExitStack | None = None
        self._widened: set[int] = set()
        self._names: dict[str, str] = {}
        self._state: State | None = None  # what is active in the shared model; None: not known
        self._unscale = contextlib.ExitStack()
        self._apart: dict[str, tuple[Path, Task]] = {}
        self._invocations: dict[str, tuple[int, ...]] = {}
        # Adapters that stand apart, each with a base model of its own, the last used last.
        self._loaded: dict[str, Any] = {}
        if quantization is not None:
            self.round(quantization)

    @property
    def parameters(self) -> int:
        """Number of the base model's parameters."""
        return self._size

    @property
    def bare(self) -> Any:
        """transformers' model, as the checkpoint is: before it is rounded or adapters attached.

        Raises:
            OptionError: that was done already.
        """
        if self._names or self._apart or self._quantization is not None:
            raise OptionError(
                "the reference has adapters already, or rounded weights",
                "Open another one, or give the base's folder.",
            )
        return self._shared

    def round(self, quantization: Quantization) -> None:
        """Give the layers the values that their codes mean, as PEFT sees a quantized layer.

        Before any adapter is attached.
        """
        self._quantization = quantization
        self._rounded(self._shared, self._by_layer)

    def attach(
        self, name: str, directory: str | os.PathLike[str], num_labels: int | None = None
    ) -> None:
        """Load a PEFT directory under ``name``; it is inactive until a state asks for it.

        What PEFT cannot hold beside other adapters (biases, ``modules_to_save``, …) gets a base
        model of its own, loaded when a state first asks for it.

        Args:
            name: what states call it.
            directory: of PEFT's files.
            num_labels: size of the task head that it brings; ``None``: the base's.

        Raises:
            AdapterError: PEFT cannot load the directory; of one that stands apart, when it is
                first active.
        """
        config = read_config(Path(directory))
        self._invocations[name] = tuple(config.get("alora_invocation_tokens") or ())
        if stands_apart(config) or num_labels is not None:
            task = Task(self.task.name, num_labels, self.task.heads)
            self._apart[name] = Path(directory), task
            return
        # PEFT's adapter names are module names, which must not have dots.
        inner = f"adapter{len(self._names)}"
        self._shared = self._attached(self._shared, directory, inner)
        self._names[name] = inner
        self._state = None

    def can_blend(self, name: str) -> bool:
        """Whether PEFT can have the adapter active beside another, or at another weight."""
        return name in self._names

    def outputs(
        self,
        rows: Sequence[Inputs],
        states: Sequence[State],
        prompts: Sequence[int] | None = None,
        *,
        low_rank: bool = True,
    ) -> list[NDArray[np.floating]]:
        """The task's output for each row alone.

        Args:
            rows: inputs.
            states: what is active on each row. Several adapters, or one at another weight than 1,
                must be such that :meth:`can_blend`.
            prompts: how many tokens of each row are its prompt, which decides where an aLoRA
                begins; all of them when omitted.
            low_rank: ``False`` switches the low-rank parts off and keeps an adapter's task head:
                what the adapter's effect is measured against.

        Returns:
            ``[seq, vocab]`` (of an encoder-decoder ``[decoder's seq, vocab]``), ``[labels]``,
            ``[seq, labels]`` or ``[seq, hidden]`` per row; float32, or float64 inside :meth:`wide`.
        """
        found: dict[int, NDArray[np.floating]] = {}
        # PEFT goes through the whole model to switch, so rows of one state run one after the other.
        for state in sorted(set(states)):
            with self._active(state, low_rank=low_rank) as model:
                for index in [index for index, own in enumerate(states) if own == state]:
                    prompt = None if prompts is None else prompts[index]
                    found[index] = self._output(model, rows[index], state, prompt)
        return [found[index] for index in range(len(rows))]

    def logits(
        self,
        rows: Sequence[Sequence[int]],
        states: Sequence[State],
        prompts: Sequence[int] | None = None,
    ) -> list[NDArray[np.floating]]:
        """As :meth:`outputs`, of token ids: ``[len, vocab]`` per row."""
        return self.outputs([_tokens(row) for row in rows], states, prompts)

    def prefill(
        self, row: Sequence[int], state: State
    ) -> tuple[NDArray[np.floating], list[tuple[NDArray[np.floating], NDArray[np.floating]]]]:
        """The logits of one row, and the cache that it leaves.

        Returns:
            ``[len, vocab]``, and for each layer keys and values ``[1, heads, len, head_dim]``.
        """
        with self._active(state) as model:
            ids = self._torch.tensor([list(row)], dtype=self._torch.int64)
            offsets = self._offsets(_tokens(row), state, None)
            out = model(input_ids=ids, use_cache=True, **offsets)
        layers = out.past_key_values.layers
        return out.logits[0].numpy(), [(x.keys.numpy(), x.values.numpy()) for x in layers]

    def module_outputs(
        self, row: Inputs, state: State, paths: Iterable[str], prompt: int | None = None
    ) -> dict[str, NDArray[np.floating]]:
        """What modules of the model give for one row, alone.

        Args:
            row: inputs.
            state: what is active.
            paths: module paths of the base model; those that it lacks, or that it calls more than
                once or never, are not in the result.
            prompt: how many of the tokens are the prompt, as in :meth:`outputs`.

        Returns:
            module path -> the module's output without the batch's axis, float32, or float64 inside
            :meth:`wide`; and the task's output by the name :data:`LOGITS`.
        """
        with self._active(state) as model, listened(base_of(model), paths) as found:
            output = self._output(model, row, state, prompt)
        return {**once(found), LOGITS: output}

    def called(self, row: Inputs, state: State) -> list[str]:
        """The modules with weights of their own, in the order in which they run on a row."""
        with self._active(state) as model, ran(base_of(model)) as found:
            self._output(model, row, state, None)
        return found

    def greedy(self, rows: Sequence[Sequence[int]], state: State, steps: int) -> list[Greedy]:
        """Greedy continuations with the cache, each row alone, end-of-text tokens included."""
        found: list[Greedy] = []
        for row in rows:
            tokens: list[int] = []
            margins: list[float] = []
            feed, cache = list(row), None
            with self._active(state) as model:
                for step in range(steps):
                    ids = self._torch.tensor([feed], dtype=self._torch.int64)
                    # Counted from the end of what is fed: of one token, all is active or nothing.
                    offsets = self._offsets(_tokens(row), state, None)
                    if offsets and step:
                        offsets = {"alora_offsets": [x and 1 for x in offsets["alora_offsets"]]}
                    out = model(input_ids=ids, past_key_values=cache, use_cache=True, **offsets)
                    best = out.logits[0, -1].topk(2)
                    cache, feed = out.past_key_values, [int(best.indices[0])]
                    tokens += feed
                    margins.append(float(best.values[0] - best.values[1]))
            found.append(Greedy(tuple(tokens), tuple(margins)))
        return found

    @contextlib.contextmanager
    def wide(self) -> Iterator[None]:
        """Run in float64 inside the block; the weights come back unchanged.

        Parts that the model itself computes in float32 (its norms, its softmax) stay so. Of a large
        model no copy is made.
        """
        with contextlib.ExitStack() as stack:
            self._widening, self._widened = stack, set()
            try:
                yield
            finally:
                self._widening = None

    def _load(self, task: Task, *, stored: bool = False) -> Any:
        # Imports torch, so it waits until libraries() has said that it is there.
        from lora_edge.base.model import load_whole, loading
        from lora_edge.base.model import read_config as read_model_config

        with loading(self.base, task, None):
            config = read_model_config(self.base, task)
        if hasattr(config, "_experts_implementation"):
            # The model's own loop; the grouped operator does not exist in float64.
            config._experts_implementation = "eager"
        return load_whole(self.base, task, config=config, pooler=True, stored=stored)

    def _attached(self, model: Any, directory: str | os.PathLike[str], inner: str) -> Any:
        """The model with an adapter; its base stays as it is.

        An adapter file may hold the base's embedding and output layer, which PEFT would load over
        the rounded ones.
        """
        ends: list[Any] = []
        if self._quantization is not None and not self._large:  # whose codes stand apart
            ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        own = [x.weight for x in ends if x is not None]
        kept = {id(x): (x, x.detach().clone()) for x in own}
        adapted = attached(model, directory, inner)
        for parameter, values in kept.values():
            parameter.detach().copy_(values)
        return adapted

    def _rounded(self, model: Any, by_layer: ByLayer) -> None:
        """Give a model, without adapters yet, the quantized layers' values."""
        if self._quantization is None:
            return
        plain = (self._torch.nn.Linear, self._torch.nn.Embedding)
        done: set[int] = set()
        for path in self._quantization.layers:
            module = model.get_submodule(path)
            own = module.weight.detach()
            if id(module.weight) in done:  # tied
                continue
            done.add(id(module.weight))
            transposed = not isinstance(module, plain)  # Conv1D
            matrix = own.T if transposed else own
            blocks = self._quantization.blocks(path, matrix.float().numpy())
            if self._large:
                by_layer.round(module.weight, blocks, transposed=transposed)
            else:
                matrix.copy_(self._torch.from_numpy(blocks.weight()))

    def _output(
        self, model: Any, row: Inputs, state: State, prompt: int | None
    ) -> NDArray[np.floating]:
        dtype = self._torch.float32 if self._widening is None else self._torch.float64
        feeds = {name: self._torch.from_numpy(array)[None] for name, array in row.items()}
        for key, value in feeds.items():
            feeds[key] = value.to(dtype) if value.is_floating_point() else value
        if self.task.causal:
            feeds |= {"use_cache": False, **self._offsets(row, state, prompt)}
        elif is_peft(model):
            # PEFT's own forward gives some models arguments that they do not take.
            model = model.base_model
        output: NDArray[np.floating] = getattr(model(**feeds), self.task.output)[0].numpy()
        return output

    def _offsets(self, row: Inputs, state: State, prompt: int | None) -> dict[str, Any]:
        """Where an aLoRA begins, counted from the end of the row as PEFT counts."""
        invocation = next((x for name, _ in state if (x := self._invocations[name])), ())
        if not invocation:
            return {}
        ids = tuple(row["input_ids"].tolist())
        starts = [
            start
            for start in range((len(ids) if prompt is None else prompt) - len(invocation) + 1)
            if ids[start : start + len(invocation)] == invocation
        ]
        return {"alora_offsets": [len(ids) - starts[-1] if starts else None]}

    @contextlib.contextmanager
    def _active(self, state: State, *, low_rank: bool = True) -> Iterator[Any]:
        """The model in which a state is active, for inference."""
        apart = [name for name, _ in state if name in self._apart]
        with contextlib.ExitStack() as stack:
            if apart:
                if len(state) > 1 or state[0][1] != 1.0:
                    raise ValueError(f"PEFT cannot blend or weight {apart[0]}")
                model = self._apart_model(apart[0])
                if not low_rank:
                    stack.enter_context(without_low_rank(model))
            else:
                wanted = state if low_rank else BASE
                if self._names and self._state != wanted:
                    self._activate(wanted)
                model = self._shared
            if self._large:
                by_layer = self._by_layer_apart[apart[0]] if apart else self._by_layer
                wide = self._widening is not None
                dtype = self._torch.float64 if wide else self._torch.float32
                stack.enter_context(by_layer.computing(model, dtype))
            elif self._widening is not None and id(model) not in self._widened:
                self._widening.enter_context(widened(model))
                self._widened.add(id(model))
            stack.enter_context(running(state, self._names))
            # Behind what loads models: a tensor that is made inside cannot be changed outside.
            stack.enter_context(self._torch.inference_mode())
            yield model

    def _activate(self, state: State) -> None:
        """Switch the shared model to a state."""
        self._state = None
        self._unscale.close()
        tuner = self._shared.base_model
        if state:
            weights = {self._names[name]: weight for name, weight in state}
            tuner.enable_adapter_layers()
            tuner.set_adapter(list(weights))
            self._unscale.enter_context(scaled(self._shared, weights))
        else:
            tuner.disable_adapter_layers()
        self._state = state

    def _apart_model(self, name: str) -> Any:
        model = self._loaded.pop(name, None)
        if model is None:
            while self._loaded and (len(self._loaded) + 1) * self._size > _KEPT:
                gone = next(iter(self._loaded))
                del self._loaded[gone]
                self._by_layer_apart.pop(gone, None)
            from lora_edge.base.mapped import Mapped
            from lora_edge.parity.by_layer import ByLayer

            directory, task = self._apart[name]
            # PEFT makes what replaces or adds to a module in the dtype that the module has.
            model = self._load(task)
            by_layer = ByLayer(Mapped(model, self.base.files), parts=False)
            self._by_layer_apart[name] = by_layer
            self._rounded(model, by_layer)
            model = self._attached(model, directory, "only")
        self._loaded[name] = model
        return model


def _tokens(row: Sequence[int]) -> Inputs:
    return {"input_ids": np.array(row, np.int64)}
