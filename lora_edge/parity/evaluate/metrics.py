"""Metrics on examples, under PyTorch and under the bundle: scores, the higher the better."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lora_edge.bundle.bundle import Bundle
from lora_edge.errors import DataError
from lora_edge.parity.compare import log_total
from lora_edge.parity.plan.examples import Example
from lora_edge.parity.plan.states import BASE, Row, State, only
from lora_edge.parity.reference import Reference
from lora_edge.parity.subjects.encoder import EncoderSubject
from lora_edge.runtime import Runner
from lora_edge.tasks.task import Task

Scores = NDArray[np.float64]
"""``[examples]``."""

_BATCH = 8
_ROOM = 8  # tokens that an answer may be longer than the right one


class Metric(ABC):
    """One metric of one bundle, on either side."""

    metric: str

    @abstractmethod
    def scores(self, name: str, examples: Sequence[Example]) -> tuple[Scores, Scores, Scores]:
        """The scores of the bundle with an adapter, of PyTorch with it, and without it."""

    def noise(self, examples: Sequence[Example], each: float) -> Scores:  # noqa: ARG002
        """What two equal scores may differ by, where a log probability may by ``each``."""
        return np.zeros(len(examples))

    def average(self, scores: Scores, examples: Sequence[Example]) -> float:  # noqa: ARG002
        """The metric over all examples."""
        return float(scores.mean())


def check_metric(bundle: Bundle, metric: str | None) -> str:
    """The metric, or the first that the bundle's task has.

    Raises:
        DataError: the task has no such metric.
    """
    task = Task(bundle.manifest.task)
    known = task.facts.metrics
    if not known or metric not in {None, *known}:
        raise DataError(
            f"a bundle of {task.name} has no metric"
            + (f" {metric!r}; it has {', '.join(known)}" if known else ""),
            "Text generators have exact_match and perplexity, text classifiers accuracy.",
        )
    return metric or known[0]


def right_labels(bundle: Bundle, name: str, examples: Sequence[Example]) -> list[int]:
    """The label of each example, as a place in an adapter's task head.

    Raises:
        DataError: the head has no such label.
    """
    labels = bundle.adapter(name).labels
    right = []
    for example in examples:
        if example.answer in labels:
            right.append(labels.index(example.answer))
        elif example.answer.isdecimal() and int(example.answer) < len(labels):
            right.append(int(example.answer))
        else:
            raise DataError(
                f"the label {example.answer!r} is none of {name}'s: {', '.join(labels)}",
                "Give its labels, or their numbers from 0.",
            )
    return right


def choose(runner: Runner, reference: Reference, metric: str | None) -> Metric:
    """The metric, ready to measure; raises as :func:`check_metric`."""
    return _KINDS[check_metric(runner.bundle, metric)](runner, reference)


class _Generated(Metric):
    """A text generator."""

    def __init__(self, runner: Runner, reference: Reference) -> None:
        self._runner = runner
        self._reference = reference
        self._tokenizer = runner.tokenizer
        self._ends = runner.eos_ids

    def _use(self, name: str) -> None:
        """Read text as rows of this adapter do, on every side of the comparison."""
        self._tokenizer = self._runner.tokenizer_of(name)
        self._ends = self._runner.eos_of(name)

    def _split(self, example: Example) -> tuple[Row, Row]:
        """The tokens of the prompt, and of what follows in the two together."""
        prompt = self._tokenizer.encode(example.text)
        whole = self._tokenizer.encode(example.text + example.answer)
        shared = len(prompt)
        while prompt[:shared] != whole[:shared]:
            shared -= 1
        if not shared or shared == len(whole):
            raise DataError(
                f"the completion {example.answer[:40]!r} adds no token to its prompt",
                "Give a prompt and a completion of at least one token each.",
            )
        return tuple(whole[:shared]), tuple(whole[shared:])


class _ExactMatch(_Generated):
    """Whether the greedy completion is the right one, apart from blanks around it."""

    metric = "exact_match"

    def scores(self, name: str, examples: Sequence[Example]) -> tuple[Scores, Scores, Scores]:
        self._use(name)
        said = self._proposed(name, examples)
        without = None
        if self._runner.bundle.manifest.mode == "switchable":
            without = self._proposed(None, examples)
        return (
            self._right(examples, said),
            self._right(examples, self._answers(only(name), examples, said)),
            self._right(examples, self._answers(BASE, examples, without)),
        )

    def _steps(self, examples: Sequence[Example]) -> int:
        return max(len(self._split(example)[1]) for example in examples) + _ROOM

    def _proposed(self, name: str | None, examples: Sequence[Example]) -> list[list[int]]:
        """What the bundle says, end tokens included."""
        rows = [self._tokenizer.encode(example.text) for example in examples]
        steps = self._steps(examples)
        return [
            answer
            for start in range(0, len(rows), _BATCH)
            for answer in self._runner.generate_ids(rows[start : start + _BATCH], name, steps)
        ]

    def _answers(
        self, state: State, examples: Sequence[Example], proposed: list[list[int]] | None
    ) -> list[list[int]]:
        """What PyTorch says. One forward shows whether it is what the bundle proposes."""
        steps = self._steps(examples)
        ends = self._runner.eos_ids if state == BASE else self._ends
        found = []
        for index, example in enumerate(examples):
            row = tuple(self._tokenizer.encode(example.text))
            if proposed is not None:
                answer = proposed[index]
                whole = (*row, *answer)
                (logits,) = self._reference.logits([whole], [state], [len(row)])
                if logits[len(row) - 1 : -1].argmax(-1).tolist() == answer:
                    found.append(answer)
                    continue
            (said,) = self._reference.greedy([row], state, steps)
            stop = next((i for i, token in enumerate(said.tokens) if token in ends), steps)
            found.append(list(said.tokens[: stop + 1]))
        return found

    def _right(self, examples: Sequence[Example], answers: Sequence[Sequence[int]]) -> Scores:
        said = [self._tokenizer.decode(list(answer)).strip() for answer in answers]
        pairs = zip(said, examples, strict=True)
        return np.array([float(text == example.answer.strip()) for text, example in pairs])


class _Perplexity(_Generated):
    """The log probability of the completion, in nats; the metric is exp of minus its mean."""

    metric = "perplexity"

    def scores(self, name: str, examples: Sequence[Example]) -> tuple[Scores, Scores, Scores]:
        self._use(name)
        parts = [self._split(example) for example in examples]
        ours: list[float] = []
        for start in range(0, len(parts), _BATCH):
            part = parts[start : start + _BATCH]
            logits = self._runner.logits([[*a, *b] for a, b in part], adapter=name)
            ours += [_likelihood(*pair, row) for pair, row in zip(part, logits, strict=True)]
        theirs, without = (
            np.array([_likelihood(a, b, self._logits(a, b, state)) for a, b in parts])
            for state in (only(name), BASE)
        )
        return np.array(ours), theirs, without

    def _logits(self, prompt: Row, answer: Row, state: State) -> NDArray[np.floating]:
        return self._reference.logits([(*prompt, *answer)], [state], [len(prompt)])[0]

    def noise(self, examples: Sequence[Example], each: float) -> Scores:
        return each * np.array([len(self._split(example)[1]) for example in examples])

    def average(self, scores: Scores, examples: Sequence[Example]) -> float:
        tokens = sum(len(self._split(example)[1]) for example in examples)
        return float(np.exp(-scores.sum() / tokens))


def _likelihood(prompt: Row, answer: Row, logits: NDArray[np.floating]) -> float:
    rows = logits[len(prompt) - 1 : len(prompt) - 1 + len(answer)].astype(np.float32)
    chosen = rows[np.arange(len(answer)), list(answer)].astype(np.float64)
    return float((chosen - log_total(rows)).sum())


class _Accuracy(Metric):
    """Whether the best label is the right one."""

    metric = "accuracy"

    def __init__(self, runner: Runner, reference: Reference) -> None:
        self._runner = runner
        self._reference = reference
        self._subject = EncoderSubject(runner.bundle.manifest.parts, None)

    def scores(self, name: str, examples: Sequence[Example]) -> tuple[Scores, Scores, Scores]:
        states = self._runner.states(name, len(examples))
        texts = [example.text for example in examples]
        coded = self._runner.outputs.encode(texts, states=states)
        ours: list[NDArray[np.floating]] = []
        for start in range(0, len(coded), _BATCH):
            part = coded[start : start + _BATCH]
            binding = self._runner.binding(name, len(part))
            ids, types = [x.ids for x in part], [x.type_ids for x in part]
            ours += self._runner.outputs.rows(ids, types, binding)
        rows = [self._subject.inputs_of(one.ids, one.type_ids) for one in coded]
        active = [only(name)] * len(rows)
        theirs, without = (
            self._reference.outputs(rows, active, low_rank=low_rank) for low_rank in (True, False)
        )
        right = np.array(right_labels(self._runner.bundle, name, examples), np.int64)
        found = (np.array([row.argmax() for row in side]) for side in (ours, theirs, without))
        first, second, third = ((side == right).astype(np.float64) for side in found)
        return first, second, third


_KINDS: dict[str, type[_ExactMatch] | type[_Perplexity] | type[_Accuracy]] = {
    "exact_match": _ExactMatch,
    "perplexity": _Perplexity,
    "accuracy": _Accuracy,
}
