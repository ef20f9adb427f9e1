"""What PyTorch gives for a bundle, whatever its task."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from lora_edge.base.checkpoint import Base
from lora_edge.bundle.manifest import GraphSpec, Seq2SeqSpec
from lora_edge.errors import DataError
from lora_edge.parity.checks import greedy
from lora_edge.parity.plan.conversation import chat_row
from lora_edge.parity.plan.plan import Depth
from lora_edge.parity.plan.states import Probe, Row
from lora_edge.parity.record.golden import Golden
from lora_edge.runtime import Runner
from lora_edge.tasks.task import TEXT_GENERATION


def ask(
    runner: Runner,
    base: Base,
    directories: Mapping[str, str | os.PathLike[str]],
    progress: Callable[[str], None],
    *,
    steps: int | None = None,
    seed: int = 0,
    prompts: Sequence[str] = (),
    given: Sequence[Probe] = (),
    planned: bool = True,
    done: Sequence[Golden] = (),
    depth: Depth = "normal",
) -> Iterator[Golden]:
    """Run probes through PyTorch, one by one.

    Args:
        runner: of the bundle that is checked; it proposes the greedy continuations.
        base: the bundle's base model.
        directories: PEFT directories of adapters whose files the bundle does not hold.
        progress: called with a line for each probe.
        steps: greedy tokens after each planned prompt; ``None``: what the task says.
        seed: of the random prompts.
        prompts: texts that are used before random prompts.
        given: probes besides those of the plan.
        planned: whether the plan is wanted.
        done: cases that are known already.
        depth: how far the plan goes.

    Yields:
        A golden case with whole logits; those of ``done`` first, as they are.

    Raises:
        As ``validate``.
    """
    from lora_edge.parity.live import Question, ask_pytorch, sources_of
    from lora_edge.parity.seq2seq_live import ask_pytorch_seq2seq
    from lora_edge.parity.task_live import ask_pytorch_task

    bundle = runner.bundle
    question = Question(
        bundle,
        base,
        sources_of(bundle, base, runner.adapters, directories),
        steps,
        seed,
        [tokens_of(runner, text) for text in prompts],
        continued=lambda probe: greedy(runner, probe),
        progress=progress,
        given=given,
        planned=planned,
        done=done,
        depth=depth,
        shaped=partial(chat_row, runner),
    )
    yield from done
    if isinstance(bundle.manifest.graph, Seq2SeqSpec):
        yield from ask_pytorch_seq2seq(question)
    elif bundle.manifest.task == TEXT_GENERATION:
        yield from ask_pytorch(question)
    else:
        yield from ask_pytorch_task(question)


def tokens_of(runner: Runner, text: str, adapter: str | None = None) -> Row:
    """The token ids of a text, as the bundle's task and a row of the adapter read it.

    Raises:
        DataError: the bundle takes no texts.
    """
    graph = runner.bundle.manifest.graph
    if isinstance(graph, Seq2SeqSpec):
        if graph.features:
            raise DataError("the bundle takes speech, not texts", "Leave the prompts out.")
    elif not isinstance(graph, GraphSpec):
        if graph.image:
            raise DataError("the bundle takes images, not texts", "Leave the prompts out.")
        return tuple(runner.outputs.encode([text], states=runner.states(adapter, 1))[0].ids)
    return tuple(runner.tokenizer_of(adapter).encode(text))


def longest_prompt(runner: Runner) -> int | None:
    """How many tokens the bundle's positions allow; ``None``: any number."""
    graph = runner.bundle.manifest.graph
    if isinstance(graph, Seq2SeqSpec):
        return graph.max_source or None
    return graph.max_length


def silent(line: str) -> None:
    """Progress that nobody listens to."""
