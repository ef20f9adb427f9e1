"""The expected outputs of a bundle without a cache, from PyTorch itself.

Knows bundles and the reference; knows nothing of runtimes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from lora_edge.adapter.load import load_adapter
from lora_edge.base.checkpoint import Base
from lora_edge.bundle.bundle import Bundle
from lora_edge.fit.task import with_heads_of
from lora_edge.names import NONE_ADAPTER
from lora_edge.parity.base.decoder import shortest_window
from lora_edge.parity.compare import Floor, expect, noise
from lora_edge.parity.live import LARGE, Question, reach_of
from lora_edge.parity.plan.plan import plan
from lora_edge.parity.plan.states import Probe, label
from lora_edge.parity.record.golden import Golden
from lora_edge.parity.task_reference import TaskReference
from lora_edge.parity.tasks import by_position, inputs_of
from lora_edge.tasks.task import Task

_IMAGES = 8
_PIXELS = 1 << 30  # seeds of pictures are below it


def ask_pytorch_task(question: Question) -> Iterator[Golden]:
    """Run an encoder's plan through PyTorch, probe by probe.

    The effect of an adapter is measured against the model with its low-rank parts off and its own
    task head kept: beside a whole new head, a lost low-rank part would hardly show.

    Yields:
        A golden case with whole outputs.
    """
    bundle, base, sources = question.bundle, question.base, question.sources
    manifest = bundle.manifest
    spec = manifest.encoder
    adapters = {name: load_adapter(path, name) for name, path in sources.items()}
    reference = task_reference_of(base, manifest.task, sources)
    probes = plan(
        tuple(sources),
        vocab_size=_PIXELS if spec.image else spec.vocab_size,
        max_length=2 if spec.image else spec.max_length,
        steps=1,
        window=None if spec.image else shortest_window(base.config),
        seed=question.seed,
        given=question.prompts,
        blendable=[x for x in sources if reference.can_blend(x) and not bundle.adapter(x).alone],
        reach={name: reach_of(adapter) for name, adapter in adapters.items()},
        depth=question.depth,
        merged=manifest.mode == "merged",
        everyone=reference.parameters <= LARGE,
    )
    headless = manifest.mode == "switchable" and _lacks_head(bundle)
    floors = question.floors
    every = question.wanted(probes)
    wanted = [kept for probe in every if (kept := _with_heads(probe) if headless else probe)]
    for index, probe in enumerate(wanted, 1):
        question.progress(f"running {probe.name} in PyTorch ({index} of {len(wanted)})")
        yield _expected(reference, probe, bundle, floors)


def task_reference_of(base: Base, task_name: str, sources: Mapping[str, Path]) -> TaskReference:
    """The base in PyTorch, and one more for each adapter, of :func:`sources_of`."""
    adapters = {name: load_adapter(path, name) for name, path in sources.items()}
    reference = TaskReference(base, with_heads_of(Task(task_name), adapters.values()))
    for name, directory in sources.items():
        reference.attach(name, directory, adapters[name].head_labels(reference.label_layer))
    return reference


def _lacks_head(bundle: Bundle) -> bool:
    """Whether the base alone has outputs that mean nothing, because its head is made up."""
    has_head = any("W" in site.parts for site in bundle.manifest.sites.values())
    return has_head and not bundle.adapter(NONE_ADAPTER).labels


def _with_heads(probe: Probe) -> Probe | None:
    """The probe without its rows of the base, ``None`` if nothing is left."""
    kept = [index for index, state in enumerate(probe.states) if state]
    if not kept:
        return None
    rows = tuple(probe.rows[index] for index in kept)
    states = tuple(probe.states[index] for index in kept)
    return dataclasses.replace(probe, rows=rows, states=states)


def _expected(
    reference: TaskReference, probe: Probe, bundle: Bundle, floors: dict[str, Floor]
) -> Golden:
    spec = bundle.manifest.encoder
    rows = [inputs_of(spec, row) for row in probe.rows]
    active = [dict(state) for state in probe.states]
    pairs = list(zip(rows, active, strict=True))
    outputs = [by_position(reference.outputs([row], state)[0]) for row, state in pairs]
    bases = [
        by_position(reference.outputs([row], state, low_rank=False)[0]).astype(np.float32)
        if state
        else None
        for row, state in pairs
    ]
    narrow = [output.astype(np.float32) for output in outputs]
    with reference.wide():
        for state in dict.fromkeys(probe.states):
            own = [i for i, other in enumerate(probe.states) if other == state]
            wide = [by_position(reference.outputs([rows[i]], active[i])[0]) for i in own]
            floor = noise([narrow[i] for i in own], wide)
            # A few labels on a few rows are few numbers: what was seen before counts as well.
            floors[label(state)] = floor.joined(floors.get(label(state)))
    return Golden(
        dataclasses.replace(probe, steps=0),
        tuple(() for _ in rows),
        tuple(expect(y, base) for y, base in zip(narrow, bases, strict=True)),
        {label(state): floors[label(state)] for state in probe.states},
        reference.versions,
    )
