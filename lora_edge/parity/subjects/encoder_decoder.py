"""An encoder and a decoder in two graphs.

A probe's rows are the encoder's token ids; of speech, one number each, the seed of features of
noise. What the decoder begins with follows from the row.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_edge.maths.lora import FloatArray
from lora_edge.parity.plan.states import Inputs, Probe, Row
from lora_edge.parity.question import Question
from lora_edge.parity.reference import Reference
from lora_edge.parity.subjects.subject import SEEDS, Subject, binding_of, continued, noise_of
from lora_edge.runtime import Runner
from lora_edge.runtime.seq2seq import Sources

_STEPS = 16
_LONGEST_BEGINNING = 6
_LONG_ENOUGH = 512  # where positions are relative


class EncoderDecoderSubject(Subject):
    """A model that answers or transcribes."""

    layered = False

    @property
    def known(self) -> tuple[str, ...]:
        """Nothing: the model's config is of both parts."""
        return ()

    def probes(self, question: Question, reference: Reference) -> Sequence[Probe]:
        """16 greedy tokens after what the decoder begins with."""
        steps = self._within(_STEPS if question.steps is None else question.steps)
        probes = self._planned(question, reference, steps=1, **self._drawn)
        return [dataclasses.replace(probe, steps=steps) for probe in probes]

    def survey(self, name: str, steps: int, **own: Any) -> Probe:
        """What follows does not stand in the prompt's row."""
        probe = super().survey(name, 1, **{**self._drawn, **own})
        return dataclasses.replace(probe, steps=self._within(steps))

    @property
    def _drawn(self) -> dict[str, Any]:
        """Below what the numbers of a random prompt are, and how many there may be."""
        if self.reads.sample:
            return {"vocab_size": SEEDS, "max_length": 2}
        longest = self.reads.max_length or _LONG_ENOUGH
        return {"vocab_size": self.reads.vocab_size, "max_length": longest}

    def greedy(self, reference: Reference, probe: Probe) -> list[Row]:
        """Each row after its own beginning, without a cache."""
        tails: list[Row] = [()] * len(probe.rows)
        for _ in range(probe.steps):
            asked = [self.inputs(*pair) for pair in zip(probe.rows, tails, strict=True)]
            found = reference.outputs(asked, probe.states)
            pairs = zip(tails, found, strict=True)
            tails = [(*tail, int(np.argmax(logits[-1]))) for tail, logits in pairs]
        return tails

    def _within(self, steps: int) -> int:
        """As many steps as the decoder's positions allow."""
        longest = self.gives.max_length
        return min(steps, longest - _LONGEST_BEGINNING) if longest else steps

    def inputs(self, row: Row, tail: Row = ()) -> Inputs:
        """What the encoder reads, and the decoder's beginning and tail."""
        return self.inputs_of(row, (*self.begun(row), *tail))

    def inputs_of(self, row: Row, target: Row) -> Inputs:
        """The same of a target that is given."""
        decoded = {"decoder_input_ids": np.array(target, np.int64)}
        if self.reads.sample:
            return {"input_features": noise_of(self.reads, row), **decoded}
        ids = np.array(row, np.int64)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), **decoded}

    def begun(self, row: Row) -> Row:
        """What the decoder is given first: its start token and one to five more, by the row."""
        random = np.random.default_rng(zlib.crc32(repr(row).encode()))
        count = random.integers(1, _LONGEST_BEGINNING)
        more = random.integers(0, self.gives.vocab_size, count)
        assert self.beginning is not None
        return (self.beginning.start[0], *(int(token) for token in more))

    def sources(self, rows: Sequence[Row]) -> Sources:
        """What the bundle's encoder reads of rows."""
        if not self.reads.sample:
            return rows
        return np.stack([noise_of(self.reads, row) for row in rows])

    def observe(self, runner: Runner, probe: Probe, tails: Sequence[Row]) -> list[FloatArray]:
        """Over each row's beginning and its tail."""
        pairs = zip(probe.rows, tails, strict=True)
        targets = [(*self.begun(row), *tail) for row, tail in pairs]
        binding = binding_of(runner, probe)
        return runner.seq2seq.logits(self.sources(probe.rows), targets, binding)

    def propose(self, runner: Runner, probe: Probe) -> tuple[list[Row], None]:
        """Greedy, each row after its own beginning."""
        decoding = runner.seq2seq.answer(self.sources(probe.rows), binding_of(runner, probe))
        first = decoding.prefill([self.begun(row) for row in probe.rows])
        return continued(first, decoding.step, probe), None
