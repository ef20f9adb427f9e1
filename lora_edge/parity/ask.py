"""What PyTorch gives for a bundle, probe by probe, whatever runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lora_edge.adapter.load import load_adapter
from lora_edge.base.checkpoint import Base
from lora_edge.bundle.bundle import Bundle
from lora_edge.fit.task import with_heads_of
from lora_edge.parity.compare import Floor, expect, noise
from lora_edge.parity.plan.conversation import chat_row
from lora_edge.parity.plan.plan import Depth
from lora_edge.parity.plan.states import Inputs, Probe, Row, label
from lora_edge.parity.question import Question
from lora_edge.parity.record.golden import Golden
from lora_edge.parity.reference import Reference
from lora_edge.parity.subjects import Subject, subject_of
from lora_edge.parity.subjects.encoder import by_position
from lora_edge.runtime import Runner
from lora_edge.tasks.task import Task


def open_reference(bundle: Bundle, base: Base, sources: Mapping[str, Path]) -> Reference:
    """The bundle's model in PyTorch, with its adapters; arguments as :func:`open_base`."""
    reference = open_base(bundle, base, sources)
    attach(reference, bundle, sources)
    return reference


def open_base(bundle: Bundle, base: Base, sources: Mapping[str, Path]) -> Reference:
    """The bundle's base in PyTorch, as its checkpoint is; :func:`attach` makes it the bundle's.

    Args:
        bundle: the bundle.
        base: its base model.
        sources: PEFT directories by name, of :func:`~lora_edge.parity.question.sources_of`.
    """
    adapters = [load_adapter(path, name) for name, path in sources.items()]
    return Reference(base, with_heads_of(Task(bundle.manifest.task), adapters))


def attach(reference: Reference, bundle: Bundle, sources: Mapping[str, Path]) -> None:
    """Round the base as the bundle's is, and attach the bundle's adapters.

    Raises:
        AdapterError: PEFT cannot load one.
    """
    if bundle.manifest.quantization is not None:
        reference.round(bundle.manifest.quantization)
    for name, directory in sources.items():
        layer = reference.label_layer
        labels = load_adapter(directory, name).head_labels(layer) if layer else None
        reference.attach(name, directory, labels)


def ask(
    runner: Runner,
    reference: Reference,
    sources: Mapping[str, Path],
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

    The bundle proposes its greedy continuation and PyTorch judges it, in one forward a row: where
    PyTorch's best token is the proposed one at every position, it is PyTorch's own continuation
    too. Asking PyTorch for it token by token takes minutes.

    Args:
        runner: of the bundle that is checked; it proposes the greedy continuations.
        reference: the bundle's model, its adapters attached.
        sources: PEFT directories of the bundle's adapters.
        progress: called with a line for each probe.
        steps: greedy tokens after each planned prompt; ``None``: what the subject says.
        seed: of the random prompts.
        prompts: texts that are used before random prompts.
        given: probes besides those of the plan.
        planned: whether the plan is wanted.
        done: cases that are known already.
        depth: how far the plan goes.

    Yields:
        A golden case with whole outputs; those of ``done`` first, as they are.

    Raises:
        As ``validate``.
    """
    subject = subject_of(runner.bundle.manifest)
    question = Question(
        runner.bundle,
        reference.base,
        sources,
        steps,
        seed,
        [subject.tokens_of(runner, text) for text in prompts],
        given=given,
        planned=planned,
        done=done,
        depth=depth,
        shaped=partial(chat_row, runner),
    )
    yield from done
    floors = question.floors
    every = question.wanted(subject.probes(question, reference))
    wanted = [kept for probe in every if (kept := subject.prepared(probe, runner.bundle))]
    for index, probe in enumerate(wanted, 1):
        progress(f"running {probe.name} in PyTorch ({index} of {len(wanted)})")
        tails, seen = subject.propose(runner, probe)
        runner.session.let_go()  # PyTorch maps the same weights from another file
        yield dataclasses.replace(
            _expected(reference, subject, probe, tuple(tails), floors), observed=seen
        )
        del seen  # whole logits, as what was yielded: of one probe at a time


def _expected(
    reference: Reference,
    subject: Subject,
    probe: Probe,
    tails: tuple[Row, ...],
    floors: dict[str, Floor],
) -> Golden:
    """Run one probe; ``floors`` holds what earlier probes measured and is added to."""
    rows = [subject.inputs(row, tail) for row, tail in zip(probe.rows, tails, strict=True)]
    prompts = [len(row) for row in probe.rows]
    found = reference.outputs(rows, probe.states, prompts)
    narrow = [by_position(row).astype(np.float32, copy=False) for row in found]
    active = [index for index, state in enumerate(probe.states) if state]
    plain = subject.without(reference, [rows[i] for i in active], [probe.states[i] for i in active])
    bases = {
        i: by_position(row).astype(np.float32, copy=False)
        for i, row in zip(active, plain, strict=True)
    }
    measured = _floors(reference, subject, probe, tails, (rows, prompts, narrow), floors)
    return Golden(
        probe,
        tails,
        tuple(expect(row, bases.get(index)) for index, row in enumerate(narrow)),
        {label(state): measured[label(state)] for state in probe.states},
        reference.versions,
    )


def _floors(
    reference: Reference,
    subject: Subject,
    probe: Probe,
    tails: Sequence[Row],
    ran: tuple[Sequence[Inputs], Sequence[int], Sequence[np.ndarray]],
    floors: dict[str, Floor],
) -> dict[str, Floor]:
    """The reference's noise in each state of a probe, as its subject has it measured."""
    rows, prompts, narrow = ran
    how = subject.measuring(probe, tails, reference.parameters)
    found = dict(floors)
    for state in dict.fromkeys(probe.states):
        name = label(state)
        if name in floors and not how.again:
            continue
        own = [i for i, other in enumerate(probe.states) if other == state][: how.rows]
        sample = [{key: value[: how.tokens] for key, value in rows[i].items()} for i in own]
        with reference.wide():
            wide = reference.outputs(sample, [state] * len(own), [prompts[i] for i in own])
        exact = [by_position(row) for row in wide]
        floor = noise([narrow[i][: how.tokens] for i in own], exact)
        found[name] = floor.joined(floors.get(name))
        if how.kept == "joined":
            floors[name] = found[name]
        elif how.kept == "first":
            floors.setdefault(name, floor)
    return found
