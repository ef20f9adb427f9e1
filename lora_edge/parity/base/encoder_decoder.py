"""The base check of an encoder and a decoder.

Covers what captures are known to get wrong: rows of unequal lengths on both sides, one row, rows
longer than the traced ones and than the reach of relative positions, the start token alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from lora_edge.base.checkpoint import Base
from lora_edge.parity.base.trial import Captured, Observed, Trial
from lora_edge.parity.plan.states import prompts
from lora_edge.parity.subjects.encoder_decoder import EncoderDecoderSubject
from lora_edge.parity.subjects.subject import SEEDS
from lora_edge.runtime.seq2seq import Seq2Seq

_SOURCES = (11, 40, 3, 24)
_TARGETS = (7, 1, 33, 12)
_LONGER = 150  # past the 128 tokens that T5's relative positions tell apart


class EncoderDecoderTrial(Trial):
    """Some rows and a longer one, on both sides."""

    def __init__(self, graph: Captured, base: Base, parameters: int, seed: int) -> None:  # noqa: ARG002
        """As :class:`Trial`."""
        self._graph = graph
        self._subject = EncoderDecoderSubject(graph.parts, graph.beginning)
        encoder, decoder = graph.parts["encoder"], graph.parts["decoder"]
        if encoder.sample:
            rows = prompts(SEEDS, (1,) * (len(_SOURCES) + 1), seed=seed, longest=1)
        else:
            longest = encoder.max_length or _LONGER
            rows = prompts(encoder.vocab_size, (*_SOURCES, _LONGER), seed=seed, longest=longest)
        longest = decoder.max_length or _LONGER
        lengths = (*_TARGETS, _LONGER)
        tails = prompts(decoder.vocab_size, lengths, seed=seed + 1, longest=longest - 1)
        pairs = zip(rows, tails, strict=True)
        targets = [self._subject.begun(row)[:1] + tail for row, tail in pairs]
        targets[1] = targets[1][:1]
        self._sources, self._targets = rows, targets
        self.rows = [
            self._subject.inputs_of(row, target) for row, target in zip(rows, targets, strict=True)
        ]

    def cases(self) -> Iterator[Observed]:
        """Batches of several sizes."""
        session = Seq2Seq(self._graph.folder, self._graph.parts, cut=self.cut)
        count = len(_SOURCES)
        for name, part in {
            "rows of unequal lengths": range(count),
            "one row": range(1),
            "the start token alone": range(1, 2),
            "one longer row": range(count, count + 1),
            "all rows": range(count + 1),
        }.items():
            sources = self._subject.sources([self._sources[i] for i in part])
            found = session.logits(sources, [self._targets[i] for i in part])
            yield Observed(name, [(i, 0) for i in part], found)
