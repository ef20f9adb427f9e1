"""How much of an adapter's effect is left when W + ΔW is rounded: four models in PyTorch.

Measured on the short prompts of the adapter's golden case and what the adapter makes of them in
floats. Says nothing of whether a graph is right: that is the proof's affair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lora_edge.adapter.load import Adapter
from lora_edge.base.checkpoint import Base
from lora_edge.bundle.part import Beginning, Part
from lora_edge.errors import ParityError
from lora_edge.maths.quantization import Quantization
from lora_edge.maths.survival import Effect, effect
from lora_edge.parity.plan.plan import shortest_window
from lora_edge.parity.plan.states import BASE, only
from lora_edge.parity.reference import Reference
from lora_edge.parity.subjects import of_parts
from lora_edge.parity.subjects.subject import LARGE, rows_of
from lora_edge.tasks.task import Task

_STEPS, _STEPS_OF_LARGE = 16, 8  # greedy tokens after each prompt


class Survey:
    """An adapter's effect in floats, and what is left of it with some rounding or other."""

    def __init__(
        self,
        base: Base,
        task: Task,
        adapter: Adapter,
        parts: Mapping[str, Part],
        beginning: Beginning | None = None,
    ) -> None:
        """Measure the effect in floats: logits of W + ΔW less those of W.

        Args:
            base: the base.
            task: what it does; of a model that generates.
            adapter: the adapter.
            parts: its graphs' facts.
            beginning: what an encoder-decoder's answer begins with.

        Raises:
            ParityError: it has no effect.
        """
        self._base, self._task, self._adapter = base, task, adapter
        reference = Reference(base, task)
        reference.attach(adapter.name, adapter.directory)
        small = reference.parameters <= LARGE
        subject = of_parts(parts, beginning)
        probe = subject.survey(
            adapter.name,
            _STEPS if small else _STEPS_OF_LARGE,
            window=shortest_window(base.config),
            reach={adapter.name: rows_of(adapter)},
        )
        further = subject.greedy(reference, probe)
        self._rows = [subject.inputs(*pair) for pair in zip(probe.rows, further, strict=True)]
        self._intended = self._change(reference)

    def effect(self, quantization: Quantization) -> Effect:
        """Logits of Q(W + ΔW) less those of Q(W), against the effect in floats.

        Args:
            quantization: how both are rounded; :attr:`Quantization.merged_first`.
        """
        reference = Reference(self._base, self._task, quantization)
        reference.attach(self._adapter.name, self._adapter.directory)
        found = effect(self._change(reference), self._intended)
        if found is None:
            raise ParityError(
                f"adapter {self._adapter.name} changes no logit, so that nothing of it can be lost",
                "Is it trained? An adapter without effect cannot be proved.",
            )
        return found

    def _change(self, reference: Reference) -> Sequence[NDArray[np.floating]]:
        """The logits with the adapter less those without, of each row."""
        count = len(self._rows)
        plain = reference.outputs(self._rows, [BASE] * count)
        adapted = reference.outputs(self._rows, [only(self._adapter.name)] * count)
        return [own - base for own, base in zip(adapted, plain, strict=True)]
