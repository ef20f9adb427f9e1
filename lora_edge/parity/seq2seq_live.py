"""The expected outputs of an encoder-decoder bundle, from PyTorch itself.

Knows bundles and the reference; knows nothing of runtimes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_edge.base import Base
from lora_edge.bundle import Bundle, Seq2SeqSpec
from lora_edge.parity.compare import Floor, expect, noise
from lora_edge.parity.golden import Golden
from lora_edge.parity.seq2seq import LONGEST_BEGINNING, beginning, source
from lora_edge.parity.states import Probe, Row, State, label, plan
from lora_edge.parity.task_reference import TaskReference
from lora_edge.tasks import Task

_STEPS = 16
_NOISE = 1 << 30  # seeds of features are below it
_LONG_ENOUGH = 512  # where positions are relative


def ask_pytorch_seq2seq(
    bundle: Bundle,
    base: Base,
    directories: Mapping[str, Path],
    *,
    steps: int | None,
    seed: int,
    prompts: Sequence[Row],
    continued: Callable[[Probe], Sequence[Row]],
    progress: Callable[[str], None],
) -> Iterator[Golden]:
    """Run the bundle's plan through PyTorch, probe by probe.

    The bundle proposes its greedy continuation and PyTorch judges it, in one forward a row: where
    PyTorch's best token is the proposed one at every position, it is PyTorch's own continuation.

    Args:
        bundle: the bundle that is checked.
        base: its base model.
        directories: PEFT directories of the bundle's adapters.
        steps: greedy tokens after each beginning; ``None``: 16.
        seed: of the random inputs.
        prompts: token ids of the user's own texts, used before random ones.
        continued: a probe -> the bundle's greedy continuation of each row, ``steps`` tokens.
        progress: called with a line for each probe.

    Yields:
        A golden case with whole logits.
    """
    spec = bundle.manifest.seq2seq
    reference = TaskReference(base, Task(bundle.manifest.task))
    for name, directory in directories.items():
        reference.attach(name, directory)
    steps = _STEPS if steps is None else steps
    if spec.max_target:
        steps = min(steps, spec.max_target - LONGEST_BEGINNING)
    probes = plan(
        tuple(directories),
        vocab_size=_NOISE if spec.features else spec.vocab_size,
        max_length=2 if spec.features else spec.max_source or _LONG_ENOUGH,
        steps=1,
        seed=seed,
        given=prompts,
        # Each adapter has a model of its own in PyTorch.
        blendable=(),
    )
    floors: dict[State, Floor] = {}
    for planned in probes:
        if bundle.manifest.mode == "merged" and planned.kind != "adapter":
            continue
        probe = dataclasses.replace(planned, steps=steps)
        progress(f"running {probe.name} in PyTorch")
        yield _expected(reference, probe, tuple(continued(probe)), spec, floors)


def _expected(
    reference: TaskReference,
    probe: Probe,
    tails: tuple[Row, ...],
    spec: Seq2SeqSpec,
    floors: dict[State, Floor],
) -> Golden:
    """Run one probe; ``floors`` holds what earlier probes measured and is added to."""
    inputs = []
    for row, tail in zip(probe.rows, tails, strict=True):
        target = np.array([*beginning(spec, row), *tail], np.int64)
        inputs.append({**source(spec, row), "decoder_input_ids": target})
    names = [state[0][0] if state else None for state in probe.states]

    def logits(index: int, name: str | None) -> NDArray[np.floating]:
        return reference.outputs([inputs[index]], name)[0]

    every = range(len(inputs))
    narrow = [logits(i, names[i]).astype(np.float32) for i in every]
    bases = [None if names[i] is None else logits(i, None).astype(np.float32) for i in every]
    for state in dict.fromkeys(probe.states):
        if state not in floors:
            own = [i for i in every if probe.states[i] == state]
            with reference.wide():
                wide = [logits(i, names[i]) for i in own]
            floors[state] = noise([narrow[i] for i in own], wide)
    return Golden(
        probe,
        tails,
        tuple(expect(y, base) for y, base in zip(narrow, bases, strict=True)),
        {label(state): floors[state] for state in probe.states},
        reference.versions,
    )
