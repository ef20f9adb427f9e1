"""The base check of a graph without a cache.

Covers what captures are known to get wrong: rows of unequal lengths padded on the right, one row,
rows longer than the traced one and than any attention window, token types, other sizes of batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.base.checkpoint import Base
from lora_edge.maths.lora import FloatArray
from lora_edge.parity.base.trial import Captured, Observed, Trial
from lora_edge.parity.compare import Floor, Tolerance
from lora_edge.parity.plan.plan import shortest_window
from lora_edge.parity.plan.states import Inputs, prompts
from lora_edge.parity.subjects.encoder import EncoderSubject, by_position
from lora_edge.runtime.encoder import Encoder

_LENGTHS = (11, 40, 3, 24, 17, 6, 31, 9)  # unequal; what is longer than the model is cut
_IMAGES = 8
_ALWAYS = 600  # a window up to this is always run past


class EncoderTrial(Trial):
    """Some rows and a longer one, whose noise is not measured; or images."""

    def __init__(self, graph: Captured, base: Base, parameters: int, seed: int) -> None:  # noqa: ARG002
        """As :class:`Trial`."""
        self._graph, self._base = graph, base
        self._part = graph.parts["encoder"]
        self._window = _window(base.config)
        self.rows, self._covered = self._chosen(seed)
        self.measured = len(self.rows) - 1

    def _chosen(self, seed: int) -> tuple[list[Inputs], bool]:
        """The rows, and whether the last is past the window (true without one)."""
        part, random = self._part, np.random.default_rng(seed)
        if part.sample:
            shape = (_IMAGES + 1, *part.sample)
            images = random.standard_normal(shape).astype(np.float32)
            return [{"pixel_values": image} for image in images], True
        length = 2 * max(_LENGTHS) + 5
        if self._window is not None and self._window <= _ALWAYS:
            length = max(length, self._window + 7)
        length = min(length, part.max_length)
        subject = EncoderSubject(self._graph.parts, None)
        rows = []
        for row in prompts(
            part.vocab_size, (*_LENGTHS, length), seed=seed, longest=part.max_length
        ):
            # The end of the row is of the second text.
            types = np.arange(len(row)) >= random.integers(1, len(row) + 1)
            rows.append(subject.inputs_of(row, types.astype(np.int64).tolist()))
        return rows, self._window is None or length > self._window

    def senseless(self, expected: Sequence[FloatArray], floor: Floor, tolerance: Tolerance) -> str:
        """The outputs must differ from input to input by far more than the floor."""
        whole = np.concatenate([row.reshape(-1, row.shape[-1]) for row in expected])
        self._spread = float(np.sqrt(np.mean((whole - whole.mean(0)) ** 2)))
        if self._spread * tolerance.sensitivity > floor.rms:
            return ""
        return (
            f"the outputs of {self._base.name_or_path} differ from input to input by "
            f"{self._spread:.1e} only (floor {floor.rms:.1e}), so that a comparison proves nothing"
        )

    def cases(self) -> Iterator[Observed]:
        """A batch, one row, and the longer row."""
        encoder = Encoder(self._graph.folder, self._graph.parts, cut=self.cut)
        last = len(self.rows) - 1
        cases = {
            "rows padded on the right": range(last),
            "one row": range(1),
            "one longer row": range(last, last + 1),
        }
        if self._part.sample:
            cases = {f"{last} images": range(last), "one image": range(last, last + 1)}
        for name, chosen in cases.items():
            outputs = encoder.run(self._batch(encoder, [self.rows[i] for i in chosen]))
            lengths = [len(self.rows[i].get("input_ids", ())) for i in chosen]
            by_token = outputs.ndim > 2 and not self._part.sample
            own = [
                by_position(output[:length] if by_token else output)
                for output, length in zip(outputs, lengths, strict=True)
            ]
            yield Observed(name, [(i, 0) for i in chosen], own)

    def _batch(self, encoder: Encoder, rows: Sequence[Inputs]) -> Mapping[str, NDArray[Any]]:
        if self._part.sample:
            return {"pixel_values": np.stack([row["pixel_values"] for row in rows])}
        types = None
        if "token_type_ids" in self._part.inputs:
            types = [row["token_type_ids"].tolist() for row in rows]
        return encoder.feeds([row["input_ids"].tolist() for row in rows], types)

    def judged(
        self, case: Observed, wanted: Sequence[FloatArray], floor: Floor, tolerance: Tolerance
    ) -> tuple[str, dict[str, float]]:
        """By the largest error: a head of one label has no spread to be compared with."""
        error, limit = 0.0, tolerance.multiple * floor.logit
        for row, output in zip(wanted, case.outputs, strict=True):
            # fmax would drop a NaN; a NaN must reach the verdict
            error = float(np.maximum(error, np.abs(output - row).max()))
        said = (
            f"{case.name}: error {error:.1e} exceeds the limit {limit:.1e} "
            f"(floor {floor.logit:.1e})"
        )
        return "" if error <= limit else said, {"error": error}

    def facts(self) -> dict[str, Any]:
        """How far the outputs are spread, how long the rows were, and the window."""
        return {
            "spread": self._spread,
            "longest_row": len(self.rows[-1].get("input_ids", ())),
            "window": self._window,
            "window_covered": self._covered,
        }


def _window(config: Mapping[str, Any]) -> int | None:
    """The attention window of a ``config.json``; ModernBERT's is counted in both directions."""
    return shortest_window(config) or (
        config["local_attention"] // 2 if config.get("local_attention") else None
    )
