"""The expected outputs of an encoder-decoder bundle, from PyTorch itself.

Knows bundles and the reference; knows nothing of runtimes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lora_edge.bundle.manifest import Seq2SeqSpec
from lora_edge.parity.compare import Floor, expect, noise
from lora_edge.parity.live import LARGE, Question
from lora_edge.parity.plan.plan import plan
from lora_edge.parity.plan.states import BASE, Probe, Row, State, label
from lora_edge.parity.record.golden import Golden
from lora_edge.parity.seq2seq import LONGEST_BEGINNING, beginning, source
from lora_edge.parity.task_reference import TaskReference
from lora_edge.tasks.task import Task

_STEPS = 16
_NOISE = 1 << 30  # seeds of features are below it
_LONG_ENOUGH = 512  # where positions are relative


def ask_pytorch_seq2seq(question: Question) -> Iterator[Golden]:
    """Run an encoder-decoder's plan through PyTorch, probe by probe.

    PyTorch judges the bundle's greedy continuation, as :func:`ask_pytorch` does; 16 tokens of it
    where ``steps`` is ``None``.

    Yields:
        A golden case with whole logits.
    """
    bundle, base, directories = question.bundle, question.base, question.sources
    spec = bundle.manifest.seq2seq
    reference = TaskReference(base, Task(bundle.manifest.task))
    for name, directory in directories.items():
        reference.attach(name, directory)
    steps = _STEPS if question.steps is None else question.steps
    if spec.max_target:
        steps = min(steps, spec.max_target - LONGEST_BEGINNING)
    probes = plan(
        tuple(directories),
        vocab_size=_NOISE if spec.features else spec.vocab_size,
        max_length=2 if spec.features else spec.max_source or _LONG_ENOUGH,
        steps=1,
        seed=question.seed,
        given=question.prompts,
        blendable=[
            name
            for name in directories
            if reference.can_blend(name) and not bundle.adapter(name).alone
        ],
        depth=question.depth,
        merged=bundle.manifest.mode == "merged",
        everyone=reference.parameters <= LARGE,
    )
    floors = question.floors
    wanted = question.wanted([dataclasses.replace(probe, steps=steps) for probe in probes])
    for index, probe in enumerate(wanted, 1):
        question.progress(f"running {probe.name} in PyTorch ({index} of {len(wanted)})")
        yield _expected(reference, probe, tuple(question.continued(probe)), spec, floors)


def _expected(
    reference: TaskReference,
    probe: Probe,
    tails: tuple[Row, ...],
    spec: Seq2SeqSpec,
    floors: dict[str, Floor],
) -> Golden:
    """Run one probe; ``floors`` holds what earlier probes measured and is added to."""
    inputs = []
    for row, tail in zip(probe.rows, tails, strict=True):
        target = np.array([*beginning(spec, row), *tail], np.int64)
        inputs.append({**source(spec, row), "decoder_input_ids": target})

    def logits(index: int, state: State) -> NDArray[np.floating]:
        return reference.outputs([inputs[index]], dict(state))[0]

    every = range(len(inputs))
    states = probe.states
    narrow = [logits(i, states[i]).astype(np.float32) for i in every]
    bases = [logits(i, BASE).astype(np.float32) if states[i] else None for i in every]
    for state in dict.fromkeys(probe.states):
        own = [i for i in every if probe.states[i] == state]
        with reference.wide():
            wide = [logits(i, state) for i in own]
        floor = noise([narrow[i] for i in own], wide)
        floors[label(state)] = floor.joined(floors.get(label(state)))
    return Golden(
        probe,
        tails,
        tuple(expect(y, base) for y, base in zip(narrow, bases, strict=True)),
        {label(state): floors[label(state)] for state in probe.states},
        reference.versions,
    )
