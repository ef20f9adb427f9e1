"""The base check of a decoder.

Covers what captures are known to get wrong: attention windows (sequences run past them), padded
batches of unequal rows on every side that the graph takes, the cache in decode steps, and a
continuation by several tokens at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from lora_edge.base.checkpoint import Base
from lora_edge.bundle.part import Part
from lora_edge.parity.base.trial import Captured, Observed, Trial
from lora_edge.parity.plan.plan import shortest_window
from lora_edge.parity.plan.states import prompts
from lora_edge.parity.subjects import of_parts
from lora_edge.runtime.decoder import Decoder

_STEPS = 8  # decode steps after the prompt
_CONTINUED = 4  # tokens that are appended at once
_PLAIN_LENGTH = 40  # of the long row, when the model has no window
_ALWAYS = 600  # a window up to this is always run past
_AFFORDABLE = 2e11  # parameters x tokens beyond which a longer window is not
_ATTENTION_BYTES = 512 << 20  # of one layer's eager attention scores


class DecoderTrial(Trial):
    """A long row and a short one, and what follows them."""

    longest = _PLAIN_LENGTH

    def __init__(self, graph: Captured, base: Base, parameters: int, seed: int) -> None:
        """As :class:`Trial`."""
        self._folder = graph.folder
        self._part = graph.parts["decoder"]
        self._window = shortest_window(base.config)
        self._length, self._covered = _length(base, self._part, self._window, parameters)
        vocabulary = self._part.vocab_size
        self._heads = prompts(vocabulary, (self._length, 3), seed=seed, longest=self._length)
        self._tails = prompts(vocabulary, (_CONTINUED + _STEPS,) * 2, seed=seed + 1, longest=99)
        subject = of_parts(graph.parts, None)
        self.rows = [
            subject.inputs(row, tail) for row, tail in zip(self._heads, self._tails, strict=True)
        ]

    def cases(self) -> Iterator[Observed]:
        """Every side of padding, one row alone, and what is decoded one by one."""
        rows, tails = self._heads, self._tails
        sides: dict[str, Part] = {}
        if self._part.padding != "left":
            sides["right"] = self._part
        if self._part.padding != "right":
            # A foreign graph's rows are laid out on the left; any graph that takes both must pass.
            sides["left"] = replace(self._part, form="foreign", padding="left")
        first, *_ = sides.values()
        decoder = Decoder(self._folder, {"decoder": first}, cut=self.cut)
        for side, layout in sides.items():
            decoder.part = layout  # how rows are laid out is no affair of the session
            longest = max(map(len, rows)) + _CONTINUED + _STEPS
            decoding = decoder.start(len(rows), longest)
            starts = [(i, 0) for i in range(len(rows))]
            yield Observed(f"prompt, padded on the {side}", starts, decoding.extend_all(rows))
            starts = [(i, len(row)) for i, row in enumerate(rows)]
            found = decoding.extend_all([tail[:_CONTINUED] for tail in tails])
            yield Observed(f"continuation after padding on the {side}", starts, found)
            starts = [(i, len(row) + _CONTINUED) for i, row in enumerate(rows)]
            steps = [
                decoding.step([tail[_CONTINUED + step] for tail in tails]) for step in range(_STEPS)
            ]
            decoded = list(np.stack(steps, axis=1))
            yield Observed(f"decode after padding on the {side}", starts, decoded)
        decoder.part = first
        # Experts of a single token may be computed in another way than those of many.
        alone = decoder.start(1, len(rows[0]) + _CONTINUED)
        yield Observed("prompt, one row", [(0, 0)], alone.extend_all(rows[:1]))
        steps = [alone.step([token]) for token in tails[0][:_CONTINUED]]
        yield Observed("decode, one row", [(0, len(rows[0]))], list(np.stack(steps, axis=1)))

    def facts(self) -> dict[str, Any]:
        """How long the rows were, and whether they went past the model's window."""
        return {
            "longest_row": self._length + _CONTINUED + _STEPS,
            "window": self._window,
            "window_covered": self._covered,
        }


def _length(base: Base, part: Part, window: int | None, parameters: int) -> tuple[int, bool]:
    """Length of the long prompt, and whether it is past the window (true without one)."""
    most = max(4, part.max_length - _CONTINUED - _STEPS)
    if window is None:
        return min(_PLAIN_LENGTH, most), True
    length = window + 7
    heads = int(base.config.get("num_attention_heads", 32))
    affordable = parameters * length <= _AFFORDABLE and 4 * heads * length**2 <= _ATTENTION_BYTES
    if length > most or not (window <= _ALWAYS or affordable):
        return min(_PLAIN_LENGTH, most), False
    return length, True
