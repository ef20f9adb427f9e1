"""A decoder with a cache: prompts at once, their continuations token by token.

The prompt runs at once and its continuation token by token through the cache, so that one
comparison covers both, and the greedy tokens: where the best token is PyTorch's at every position
of a greedy continuation, the whole continuation is PyTorch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from lora_edge.files.spilled import let_go, spilled
from lora_edge.maths.lora import FloatArray
from lora_edge.parity.plan.plan import shortest_window
from lora_edge.parity.plan.states import Inputs, Probe, Row, schedule
from lora_edge.parity.question import Question, is_long
from lora_edge.parity.reference import Reference
from lora_edge.parity.subjects.subject import LARGE, Measuring, Subject, binding_of, reach_of
from lora_edge.runtime import Runner

Turn = tuple[int | None, ...]

_STEPS, _STEPS_OF_LARGE = 64, 16
_DECODED, _DECODED_OF_LARGE = 256, 128  # of the long continuation in ``full``
# Of one long row: parameters x tokens, a layer's eager attention scores, and its logits, in bytes.
_WORK, _SCORES, _LOGITS = 1e12, 1 << 30, 1 << 30

# The floor belongs to the inputs that are compared: its largest values sit at few positions. Large
# models are sampled all the same, because float64 is slow; their floor may be too low.
_FLOOR_ROWS_OF_LARGE, _FLOOR_TOKENS_OF_LARGE = 2, 40


class DecoderSubject(Subject):
    """A text generator."""

    behind = True

    def probes(self, question: Question, reference: Reference) -> Sequence[Probe]:
        """64 greedy tokens after each prompt, or 16 above 20 M parameters."""
        small = reference.parameters <= LARGE
        steps = question.steps
        if steps is None:
            steps = _STEPS if small else _STEPS_OF_LARGE
        return self._planned(
            question,
            reference,
            vocab_size=self.reads.vocab_size,
            max_length=self.reads.max_length,
            steps=steps,
            window=shortest_window(question.base.config),
            reach=reach_of(question),
            shaped=question.shaped,
            affordable=self._affordable(question, reference.parameters),
            decoded=_DECODED if small else _DECODED_OF_LARGE,
        )

    def measuring(self, probe: Probe, tails: Sequence[Row], parameters: int) -> Measuring:
        """On the first short rows of a state, and again on those that are long."""
        if is_long(probe, tails):
            return Measuring(kept="never")
        # The weights a blend has in a crowd were seen on few tokens before.
        again = probe.part == "crowd"
        if parameters <= LARGE:
            return Measuring(again, kept="first")
        return Measuring(again, _FLOOR_ROWS_OF_LARGE, _FLOOR_TOKENS_OF_LARGE, "first")

    def longest_prompt(self, steps: int) -> int | None:
        """What follows stands in the same row."""
        longest = super().longest_prompt(steps)
        return longest and longest - steps

    def _affordable(self, question: Question, parameters: int) -> int:
        """Tokens beyond which one row costs too much."""
        config = question.base.config
        heads = int(config.get("text_config", config).get("num_attention_heads", 32))
        by_scores = math.isqrt(_SCORES // (4 * heads))
        return int(min(_WORK / parameters, by_scores, _LOGITS / (4 * self.reads.vocab_size)))

    def inputs(self, row: Row, tail: Row = ()) -> Inputs:
        """Its token ids."""
        return {"input_ids": np.array((*row, *tail), np.int64)}

    def greedy(self, reference: Reference, probe: Probe) -> list[Row]:
        """With the cache."""
        found = reference.greedy(probe.rows, probe.states[0], probe.steps)
        return [each.tokens for each in found]

    def observe(self, runner: Runner, probe: Probe, tails: Sequence[Row]) -> list[FloatArray]:
        """Prompts at once, tails token by token; rows rest where the probe says so."""
        turns = iter(schedule(tails, probe.rests))
        return _decoded(runner, probe, [len(tail) for tail in tails], lambda _: next(turns, None))

    def propose(self, runner: Runner, probe: Probe) -> tuple[list[Row], list[FloatArray]]:
        """Greedy, through the cache; one run gives the tokens and the outputs."""
        rests = probe.rests or (0,) * len(probe.rows)
        counts = [probe.steps - rest for rest in rests]
        tails: list[list[int]] = [[] for _ in counts]
        # Whose turn it is does not depend on what the tokens are.
        turns = iter(schedule([(0,) * count for count in counts], probe.rests))

        def best(outputs: Sequence[FloatArray]) -> Turn | None:
            turn = next(turns, None)
            if turn is None:
                return None
            for index, token in enumerate(turn):
                if token is not None:
                    tails[index].append(int(np.argmax(outputs[index])))
            pairs = zip(turn, tails, strict=True)
            return tuple(None if token is None else tail[-1] for token, tail in pairs)

        found = _decoded(runner, probe, counts, best)
        return [tuple(tail) for tail in tails], found


def _decoded(
    runner: Runner,
    probe: Probe,
    counts: Sequence[int],
    choose: Callable[[Sequence[FloatArray]], Turn | None],
) -> list[FloatArray]:
    """The outputs ``[positions, vocab]`` of each row, its prompt first.

    Args:
        runner: of the bundle.
        probe: the prompts.
        counts: how many tokens follow each prompt.
        choose: the last outputs of each row -> the token that it is fed, or None where it rests;
            None at the end.
    """
    longest = max(len(row) + count for row, count in zip(probe.rows, counts, strict=True))
    decoding = runner.decoder.start(len(probe.rows), longest, binding_of(runner, probe))
    whole: list[FloatArray] = []
    ends = [len(row) for row in probe.rows]
    given = decoding.extend_all(probe.rows)
    for index, count in enumerate(counts):
        row = spilled((ends[index] + count, given[index].shape[1]), np.float32)
        row[: ends[index]] = given[index]
        let_go(row)
        whole.append(row)
    del given
    while (
        turn := choose([row[end - 1] for row, end in zip(whole, ends, strict=True)])
    ) is not None:
        for index, (token, logits) in enumerate(zip(turn, decoding.step(turn), strict=True)):
            if token is not None:
                whole[index][ends[index]] = logits
                ends[index] += 1
    let_go(*whole)
    return [row[:end] for row, end in zip(whole, ends, strict=True)]
