"""The user's own prompts as golden cases of a bundle."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from lora_edge.base.checkpoint import Base, resolve_base
from lora_edge.bundle.bundle import Bundle, file_entry, load_bundle
from lora_edge.bundle.manifest import Manifest
from lora_edge.errors import BundleError, DataError, ParityError
from lora_edge.files.changing import preparing, recover
from lora_edge.names import NONE_ADAPTER
from lora_edge.parity.ask import ask, open_reference
from lora_edge.parity.checks import compare
from lora_edge.parity.compare import Tolerance
from lora_edge.parity.plan.examples import Prompt
from lora_edge.parity.plan.states import BASE, Kind, Probe, Row, only
from lora_edge.parity.question import sources_of
from lora_edge.parity.record.golden import recorded, reduce, save_golden, stem_of
from lora_edge.parity.record.record import is_same_adapter
from lora_edge.parity.subjects import subject_of
from lora_edge.runtime import Runner
from lora_edge.types import silent

_ROWS = 8  # of a batch: whole logits of one batch are in memory at a time
_STEPS = 16


def given_probes(
    bundle: Bundle,
    prompts: Sequence[Prompt],
    encode: Callable[[str, str | None], Row],
    *,
    steps: int | None = None,
    longest: int | None = None,
) -> list[Probe]:
    """The probes of the user's prompts: batches of the base and of each adapter.

    Args:
        bundle: names of its adapters, and which batches it has already.
        prompts: the user's.
        encode: text, adapter -> token ids.
        steps: greedy tokens after each prompt; ``None``: 16, where the bundle generates text.
        longest: tokens that a prompt may have.

    Raises:
        DataError: a prompt is for an adapter that the bundle lacks, is empty, or is too long.
    """
    names = sorted(set(bundle.manifest.adapters) - {NONE_ADAPTER})
    rows: list[tuple[Row, str | None]] = []
    for prompt in prompts:
        if prompt.adapter is not None and prompt.adapter not in names:
            raise DataError(
                f"a prompt is for the adapter {prompt.adapter!r}, which the bundle does not have",
                f"Its adapters are {', '.join(names)}.",
            )
        row = encode(prompt.text, prompt.adapter)
        if not row or (longest is not None and len(row) > longest):
            raise DataError(
                f"the prompt {prompt.text[:40]!r} has {len(row)} tokens, expected 1 to {longest}",
                "Shorten it.",
            )
        rows.append((row, prompt.adapter))
    known = [golden.probe for golden in recorded(bundle) if golden.probe.given]
    probes = []
    for name in (None, *names):
        own = [row for row, adapter in rows if adapter is None or adapter == name]
        kind: Kind = "base" if name is None else "adapter"
        state = BASE if name is None else only(name)
        earlier = [x.batch for x in known if x.kind == kind and x.states[0] == state]
        for batch, start in enumerate(range(0, len(own), _ROWS), max(earlier, default=0) + 1):
            part = tuple(own[start : start + _ROWS])
            who = "base" if name is None else f"adapter {name}"
            title = f"{who}, given prompts {batch}"
            count = _STEPS if steps is None else steps
            states = (state,) * len(part)
            probes.append(Probe(title, kind, part, states, count, given=True, batch=batch))
    return probes


def add_goldens(
    bundle: str | os.PathLike[str] | Bundle,
    prompts: Sequence[Prompt],
    reference: str | os.PathLike[str] | Base | None = None,
    *,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    steps: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Bundle:
    """Run prompts through PyTorch and keep the outcome in the bundle as golden cases.

    From then on ``validate`` runs them too, from the goldens and against PyTorch alike.

    Args:
        bundle: the bundle or its folder.
        prompts: the user's.
        reference: the base model; ``None``: the one that the bundle names.
        adapters: PEFT directories of adapters whose files the bundle does not hold.
        steps: greedy tokens after each prompt; ``None``: 16.
        progress: called with a line for each probe.

    Returns:
        The bundle with its new manifest.

    Raises:
        DataError: a prompt is empty, too long, or for an adapter that the bundle lacks.
        ParityError: the bundle does not do on them what PyTorch does; nothing is recorded.
        BundleError: as ``validate``.
    """
    target = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    recover(target.directory)
    target.verify_all()
    named = target.manifest.base["name_or_path"] if reference is None else reference
    base = named if isinstance(named, Base) else resolve_base(named)
    runner = Runner(target, exact=True)
    subject = subject_of(target.manifest)
    longest = subject.longest_prompt(_STEPS if steps is None else steps)
    probes = given_probes(
        target, prompts, partial(subject.tokens_of, runner), steps=steps, longest=longest
    )
    goldens = []
    say = progress or silent
    sources = sources_of(target, base, runner.adapters, adapters or {})
    model = open_reference(target, base, sources)
    for golden in ask(runner, model, sources, say, given=probes, planned=False):
        for case in compare(runner, golden, Tolerance()):
            if case.status != "passed":
                raise ParityError(
                    case.reason, "Nothing was recorded. Name the adapter that a prompt is for."
                )
        goldens.append(reduce(golden, len(probes)))
    try:
        with preparing(target.directory) as stage:
            files = {
                name: file_entry(stage / name) for name in map(partial(save_golden, stage), goldens)
            }

            def edit(now: Manifest) -> Manifest:
                target.check_graph(now)
                stems = {golden.stem for golden in goldens}
                if stems & {stem_of(name) for name in now.files.keys() - target.manifest.files}:
                    raise _overtaken("other prompts were recorded")
                for name in {name for golden in goldens for name in golden.probe.adapters}:
                    if not is_same_adapter(target.manifest, now, name):
                        raise _overtaken(f"the adapter {name} was removed or replaced")
                return dataclasses.replace(now, files={**now.files, **files})

            return target.change(stage, edit)
    except OSError as error:
        raise BundleError(
            f"the golden cases cannot be written to {target.directory}: {error.strerror}",
            "Make the folder writable, and check the disk space.",
        ) from error


def _overtaken(what: str) -> BundleError:
    return BundleError(
        f"{what} by another process meanwhile; nothing was recorded", "Call the command again."
    )
