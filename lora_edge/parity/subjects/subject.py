"""One kind of model, and how it is asked: what a probe means for PyTorch, and for a bundle."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_edge.adapter.load import Adapter, load_adapter
from lora_edge.bundle.bundle import Bundle
from lora_edge.bundle.part import Beginning, Part
from lora_edge.errors import DataError
from lora_edge.maths.lora import FloatArray
from lora_edge.names import NONE_ADAPTER
from lora_edge.parity.plan.plan import plan
from lora_edge.parity.plan.states import BASE, Inputs, Probe, Row, State
from lora_edge.runtime import Binding, Runner

if TYPE_CHECKING:
    from lora_edge.parity.question import Question
    from lora_edge.parity.reference import Reference

LARGE = 20_000_000  # parameters
SEEDS = 1 << 30  # seeds of images and of speech are below it

_REACHED_TOKENS = 4


class Measuring(NamedTuple):
    """How the reference's noise is measured on a probe, in each of its states.

    Attributes:
        again: also where an earlier probe has measured the state.
        rows: of how many of the state's rows; ``None``: of all.
        tokens: on how many tokens of each; ``None``: on all.
        kept: for later probes: ``joined`` with what is known, the ``first`` only, or ``never``.
    """

    again: bool = True
    rows: int | None = None
    tokens: int | None = None
    kept: Literal["joined", "first", "never"] = "joined"


class Subject(ABC):
    """How a model of one kind is asked.

    Args:
        parts: its graphs' facts.
        beginning: what an encoder-decoder's answer begins with.

    Attributes:
        reads: the part that reads the inputs.
        gives: the part that gives the outputs.
        behind: what is decoded stands behind the prompt, in one row.
        headed: adapters may bring a task head, beside which their effect is measured.
        layered: its layers can be compared one by one.
    """

    behind: ClassVar[bool] = False
    headed: ClassVar[bool] = False
    layered: ClassVar[bool] = True

    def __init__(self, parts: Mapping[str, Part], beginning: Beginning | None) -> None:
        self.reads = parts.get("encoder") or parts["decoder"]
        self.gives = parts.get("decoder") or parts["encoder"]
        self.beginning = beginning

    @property
    def known(self) -> tuple[str, ...]:
        """Facts of the part that reads which PyTorch's model tells as well: names of its fields."""
        return ("vocab_size", "max_length")

    @abstractmethod
    def probes(self, question: Question, reference: Reference) -> Sequence[Probe]:
        """The plan for a bundle."""

    def prepared(self, probe: Probe, bundle: Bundle) -> Probe | None:  # noqa: ARG002
        """A probe, planned or given, as this kind of model can run it; ``None``: not at all."""
        return probe

    def without(
        self, reference: Reference, rows: Sequence[Inputs], states: Sequence[State]
    ) -> Sequence[NDArray[np.floating]]:
        """The reference's outputs against which the effect of adapters is measured: the base's."""
        return reference.outputs(rows, [BASE] * len(states))

    def measuring(self, probe: Probe, tails: Sequence[Row], parameters: int) -> Measuring:  # noqa: ARG002
        """How the noise of a reference of so many parameters is measured: with every probe.

        Few outputs on few rows say little, so what earlier probes saw counts as well.
        """
        return Measuring()

    def longest_prompt(self, steps: int) -> int | None:  # noqa: ARG002
        """Tokens that a prompt may have, which so many follow; ``None``: any number."""
        return self.reads.max_length or None

    @abstractmethod
    def inputs(self, row: Row, tail: Row = ()) -> Inputs:
        """What PyTorch reads of a row and what follows it, without the batch's axis."""

    @abstractmethod
    def observe(self, runner: Runner, probe: Probe, tails: Sequence[Row]) -> list[FloatArray]:
        """The bundle's outputs ``[positions, columns]`` of each row and its tail, as one batch."""

    def off(self, runner: Runner, probe: Probe, tails: Sequence[Row]) -> list[FloatArray] | None:
        """The bundle's outputs without what its adapters add; ``None``: it does not hold them."""
        if runner.bundle.manifest.mode == "merged":
            return None
        off = dataclasses.replace(probe, kind="base", states=(BASE,) * len(probe.rows))
        return self.observe(runner, off, tails)

    def survey(self, name: str, steps: int, **own: Any) -> Probe:
        """An adapter's short prompts, and how many tokens follow; ``own`` as of the plan."""
        read = {"vocab_size": self.reads.vocab_size, "max_length": self.reads.max_length}
        probes = plan([name], steps=steps, depth="quick", merged=True, **{**read, **own})
        (probe,) = (probe for probe in probes if probe.kind == "adapter")
        return probe

    def greedy(self, reference: Reference, probe: Probe) -> list[Row]:  # noqa: ARG002
        """The reference's greedy continuation of each row of one state, past any end token."""
        return [()] * len(probe.rows)

    def propose(
        self,
        runner: Runner,  # noqa: ARG002
        probe: Probe,
    ) -> tuple[list[Row], list[FloatArray] | None]:
        """The bundle's greedy continuation of each row, past any end token.

        Returns:
            ``probe.steps`` tokens, less those of the steps for which the row rests; and what
            :meth:`observe` gives for them, where that is known by then.
        """
        return [()] * len(probe.rows), None

    def tokens_of(self, runner: Runner, text: str, adapter: str | None = None) -> Row:
        """The token ids of a text, as a row of the adapter reads it.

        Raises:
            DataError: it takes no texts.
        """
        if self.reads.sample:
            what = "images" if self.reads.inputs[0] == "pixel_values" else "speech"
            raise DataError(f"the bundle takes {what}, not texts", "Leave the prompts out.")
        return tuple(runner.tokenizer_of(adapter).encode(text))

    def _planned(self, question: Question, reference: Reference, **own: Any) -> Sequence[Probe]:
        """The plan, with what is the same for all kinds of model."""
        bundle, names = question.bundle, tuple(question.sources)
        free = [x for x in names if reference.can_blend(x) and not bundle.adapter(x).alone]
        return plan(
            names,
            seed=question.seed,
            given=question.prompts,
            blendable=free,
            depth=question.depth,
            merged=bundle.manifest.mode == "merged",
            everyone=reference.parameters <= LARGE,
            **own,
        )


def binding_of(runner: Runner, probe: Probe) -> Binding:
    """The adapters of a probe's rows."""
    choices: list[Any] = [dict(state) if state else NONE_ADAPTER for state in probe.states]
    argument: Any = choices if probe.kind == "mixed" else choices[0]
    merged = runner.bundle.manifest.mode == "merged"
    return runner.binding(None if merged else argument, len(probe.rows))


def continued(first: NDArray[Any], step: Any, probe: Probe) -> list[Row]:
    """A greedy continuation.

    Args:
        first: the logits ``[batch, vocab]`` after the prompts.
        step: a token of each row -> the logits after it.
        probe: how many tokens, and which rows rest for how long.
    """
    tokens = np.argmax(first, axis=-1)
    tails = [tokens]
    for _ in range(probe.steps - 1):
        tokens = np.argmax(step(tokens.tolist()), axis=-1)
        tails.append(tokens)
    rests = probe.rests or (0,) * len(probe.rows)
    whole = np.stack(tails, axis=1).tolist()
    return [tuple(row[: probe.steps - rest]) for row, rest in zip(whole, rests, strict=True)]


def noise_of(part: Part, row: Row) -> NDArray[np.float32]:
    """The picture or the speech that a row stands for: noise, by its seed."""
    random = np.random.default_rng(row[0])
    return random.standard_normal(part.sample).astype(np.float32)


def reach_of(question: Question) -> dict[str, list[Row]]:
    """Adapter -> what a prompt must hold for it to show what it changes."""
    return {name: rows_of(load_adapter(path, name)) for name, path in question.sources.items()}


def rows_of(adapter: Adapter) -> list[Row]:
    """What a prompt must hold for an adapter to show what it changes."""
    trained = sorted({index for tokens in adapter.tokens.values() for index in tokens.indices})
    invocations = [adapter.invocation] if adapter.invocation else []
    return [*invocations, *((index,) for index in trained[:_REACHED_TOKENS])]
