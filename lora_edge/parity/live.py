"""The expected outputs from PyTorch itself: the plan's probes run through the reference.

Knows bundles and the reference; knows nothing of runtimes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_edge.adapter.load import Adapter, load_adapter
from lora_edge.base.checkpoint import Base
from lora_edge.bundle.bundle import Bundle
from lora_edge.bundle.manifest import GraphSpec
from lora_edge.errors import AdapterError, BundleError
from lora_edge.parity.base.decoder import shortest_window
from lora_edge.parity.compare import FloatArray, Floor, expect, noise
from lora_edge.parity.plan.far import Shaped
from lora_edge.parity.plan.plan import Depth, plan
from lora_edge.parity.plan.states import BASE, Probe, Row, label
from lora_edge.parity.record.golden import Golden
from lora_edge.parity.reference import Reference

_STEPS = 64
_STEPS_OF_LARGE = 16
LARGE = 20_000_000  # parameters
_REACHED_TOKENS = 4
_DECODED, _DECODED_OF_LARGE = 256, 128  # of the long continuation in ``full``
# Of one long row: parameters x tokens, a layer's eager attention scores, and its logits, in bytes.
_WORK, _SCORES, _LOGITS = 1e12, 1 << 30, 1 << 30
# The floor belongs to the inputs that are compared: its largest values sit at few positions. Large
# models are sampled all the same, because float64 is slow; their floor may be too low.
_FLOOR_ROWS_OF_LARGE = 2
_FLOOR_TOKENS_OF_LARGE = 40
_LONGER = 100  # tokens, prompt and continuation, from which on a row's floor is its own


@dataclass(frozen=True)
class Question:
    """What PyTorch is asked.

    Attributes:
        bundle: the bundle that is checked.
        base: its base model.
        sources: PEFT directories of the bundle's adapters, of :func:`sources_of`.
        steps: greedy tokens after each prompt; ``None``: 64, or 16 above 20 M parameters.
        seed: of the random prompts.
        prompts: token ids of the user's own prompts, used before random ones.
        continued: a probe -> the bundle's greedy continuation of each row, ``steps`` tokens.
        progress: called with a line for each probe.
        given: probes of the user's own, besides those of the plan.
        planned: whether the plan is wanted.
        done: cases that are known already, from a validation that was cut off.
        depth: how far the plan goes.
        shaped: prompts in the shape of the bundle's chat template, if it has one.
    """

    bundle: Bundle
    base: Base
    sources: Mapping[str, Path]
    steps: int | None
    seed: int
    prompts: Sequence[Row]
    continued: Callable[[Probe], Sequence[Row]]
    progress: Callable[[str], None]
    given: Sequence[Probe] = ()
    planned: bool = True
    done: Sequence[Golden] = ()
    depth: Depth = "normal"
    shaped: Shaped | None = None

    @property
    def floors(self) -> dict[str, Floor]:
        """Label of a state -> its floor on short rows, as far as known."""
        usual = [golden for golden in self.done if golden.probe.part != "crowd"]
        short = [golden for golden in usual if not _is_long(golden.probe, golden.tails)]
        return {name: floor for golden in short for name, floor in golden.floors.items()}

    def wanted(self, plan: Sequence[Probe]) -> list[Probe]:
        """What is to be run: a merged bundle is its adapter and nothing else."""
        known = {golden.probe.name for golden in self.done}
        mode = self.bundle.manifest.mode
        probes = [*(plan if self.planned else ()), *self.given]
        return [
            probe
            for probe in probes
            if probe.name not in known and (mode == "switchable" or probe.kind == "adapter")
        ]


def sources_of(
    bundle: Bundle,
    base: Base,
    names: Sequence[str],
    directories: Mapping[str, str | os.PathLike[str]],
) -> dict[str, Path]:
    """The PEFT directory of each adapter: a given one, or the bundle's own copy.

    Raises:
        BundleError: the base is not the bundle's, or an adapter's PEFT files are nowhere.
        AdapterError: a given PEFT directory is not the one that was exported.
    """
    fingerprint = bundle.manifest.base["fingerprint"]
    if base.fingerprint() != fingerprint:
        raise BundleError(
            f"{base.name_or_path} has fingerprint {base.fingerprint()[:12]}, the bundle was made "
            f"from {fingerprint[:12]}",
            f"Give the bundle's own base: {bundle.manifest.base['name_or_path']}",
        )
    return {name: _peft_directory(bundle, name, directories) for name in names}


def ask_pytorch(question: Question) -> Iterator[Golden]:
    """Run a text generator's plan through PyTorch, probe by probe.

    The bundle proposes its greedy continuation and PyTorch judges it, in one forward a row: where
    PyTorch's best token is the proposed one at every position, it is PyTorch's own continuation
    too. Asking PyTorch for it token by token takes minutes.

    Yields:
        A golden case with whole logits.
    """
    bundle, base, sources, steps = question.bundle, question.base, question.sources, question.steps
    names = tuple(sources)
    reference = reference_of(bundle, base, sources)
    if steps is None:
        steps = _STEPS if reference.parameters <= LARGE else _STEPS_OF_LARGE
    spec = bundle.manifest.decoder
    alone = {name: bundle.adapter(name).alone for name in names}
    probes = plan(
        names,
        vocab_size=spec.vocab_size,
        max_length=spec.max_length,
        steps=steps,
        window=shortest_window(base.config),
        seed=question.seed,
        given=question.prompts,
        blendable=[name for name in names if reference.can_blend(name) and not alone[name]],
        reach={name: reach_of(load_adapter(path, name)) for name, path in sources.items()},
        depth=question.depth,
        merged=bundle.manifest.mode == "merged",
        shaped=question.shaped,
        affordable=_affordable(base, spec, reference.parameters),
        everyone=reference.parameters <= LARGE,
        decoded=_DECODED if reference.parameters <= LARGE else _DECODED_OF_LARGE,
    )
    floors = question.floors
    wanted = question.wanted(probes)
    for index, probe in enumerate(wanted, 1):
        question.progress(f"running {probe.name} in PyTorch ({index} of {len(wanted)})")
        yield _expected(reference, probe, tuple(question.continued(probe)), floors)


def _affordable(base: Base, spec: GraphSpec, parameters: int) -> int:
    """Tokens beyond which one row costs too much."""
    heads = int(base.config.get("text_config", base.config).get("num_attention_heads", 32))
    by_scores = math.isqrt(_SCORES // (4 * heads))
    return int(min(_WORK / parameters, by_scores, _LOGITS / (4 * spec.vocab_size)))


def reference_of(bundle: Bundle, base: Base, sources: Mapping[str, Path]) -> Reference:
    """The bundle's base in PyTorch with adapters attached, of :func:`sources_of`."""
    reference = Reference(base, bundle.manifest.quantization)
    for name, directory in sources.items():
        reference.attach(name, directory)
    return reference


def reach_of(adapter: Adapter) -> list[Row]:
    """What a prompt must hold for the adapter to show what it changes."""
    trained = sorted({index for tokens in adapter.tokens.values() for index in tokens.indices})
    invocations = [adapter.invocation] if adapter.invocation else []
    return [*invocations, *((index,) for index in trained[:_REACHED_TOKENS])]


def _peft_directory(bundle: Bundle, name: str, given: Mapping[str, str | os.PathLike[str]]) -> Path:
    if name in given:
        digest = load_adapter(given[name], name).digest
        if digest != bundle.adapter(name).digest:
            raise AdapterError(
                f"{os.fspath(given[name])} is not the adapter that was exported as {name}: its "
                f"digest is {digest[:12]}, expected {bundle.adapter(name).digest[:12]}",
                f"Give the folder that {name} was exported from.",
            )
        return Path(given[name])
    directory = bundle.directory / "adapters" / name / "peft"
    if not directory.is_dir():
        raise BundleError(
            f"the PEFT files of adapter {name} are not in the bundle",
            f"Give their folder with -a {name}=DIR.",
        )
    return directory


def _is_long(probe: Probe, tails: Sequence[Row]) -> bool:
    """Whether a probe's noise is its own: it grows with the length of a row."""
    longest = max(len(row) + len(tail) for row, tail in zip(probe.rows, tails, strict=True))
    return probe.kind != "mixed" and longest > _LONGER


def _expected(
    reference: Reference, probe: Probe, tails: tuple[Row, ...], floors: dict[str, Floor]
) -> Golden:
    """Run one probe; ``floors`` holds what earlier probes measured and is added to."""
    whole = [(*row, *tail) for row, tail in zip(probe.rows, tails, strict=True)]
    prompts = [len(row) for row in probe.rows]
    logits = [row.astype(np.float32) for row in reference.logits(whole, probe.states, prompts)]
    bases: list[FloatArray | None] = [None] * len(whole)
    active = [index for index, state in enumerate(probe.states) if state]
    plain = reference.logits([whole[i] for i in active], [BASE] * len(active))
    for index, row in zip(active, plain, strict=True):
        bases[index] = row.astype(np.float32)
    longest = max(map(len, whole))
    found: dict[str, Floor] = {}
    longer = _is_long(probe, tails)
    # The weights a blend has in a crowd were seen on few tokens before.
    todo = [
        state
        for state in dict.fromkeys(probe.states)
        if label(state) not in floors or longer or probe.part == "crowd"
    ]
    for state in todo:
        own = [i for i, other in enumerate(probe.states) if other == state]
        if reference.parameters > LARGE and not longer:
            own, longest = own[:_FLOOR_ROWS_OF_LARGE], min(longest, _FLOOR_TOKENS_OF_LARGE)
        sample = [whole[i][:longest] for i in own]
        with reference.wide():
            wide = reference.logits(sample, [state] * len(own), [prompts[i] for i in own])
        floor = noise([logits[i][:longest] for i in own], wide)
        found[label(state)] = floor.joined(floors.get(label(state)))
        if not longer:
            floors.setdefault(label(state), floor)
    return Golden(
        probe,
        tails,
        tuple(expect(y, base) for y, base in zip(logits, bases, strict=True)),
        {label(state): found.get(label(state)) or floors[label(state)] for state in probe.states},
        reference.versions,
    )
