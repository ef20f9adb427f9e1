"""The reference: Hugging Face's eager model with PEFT's unmerged forward, on the CPU.

Each row runs alone and unpadded, so that no batching, padding or cache of PyTorch's can be part of
what is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.files.spilled import moved
from lora_edge.parity.peft_models import base_of, is_peft, listened, once, ran
from lora_edge.parity.plan.states import Inputs, State
from lora_edge.parity.reference_models import ReferenceModels

LOGITS = ""
"""The path of the model itself, among those of its modules."""


@dataclass(frozen=True)
class Greedy:
    """A greedy continuation.

    Attributes:
        tokens: the new token ids.
        margins: at each step, how far the best logit was above the second.
    """

    tokens: tuple[int, ...]
    margins: tuple[float, ...]


class Reference(ReferenceModels):
    """What a base model in PyTorch, with PEFT adapters attached by name, gives for inputs."""

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

    def _output(
        self, model: Any, row: Inputs, state: State, prompt: int | None
    ) -> NDArray[np.floating]:
        feeds = {name: self._torch.from_numpy(array)[None] for name, array in row.items()}
        for key, value in feeds.items():
            feeds[key] = value.to(self._dtype) if value.is_floating_point() else value
        if self.task.causal:
            feeds |= {"use_cache": False, **self._offsets(row, state, prompt)}
        elif is_peft(model):
            # PEFT's own forward gives some models arguments that they do not take.
            model = model.base_model
        output: NDArray[np.floating] = getattr(model(**feeds), self.task.output)[0].numpy()
        return moved(output)

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


def _tokens(row: Sequence[int]) -> Inputs:
    return {"input_ids": np.array(row, np.int64)}
