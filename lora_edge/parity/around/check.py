"""One case for each thing that lies around the graph, and for what lies in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_edge.bundle.bundle import Bundle
from lora_edge.parity.around import asked
from lora_edge.parity.around.adapters import compare_tensors
from lora_edge.parity.around.files import compare_files, first_difference
from lora_edge.parity.around.golden import load_around
from lora_edge.parity.ask import attach
from lora_edge.parity.case import Case, CaseKind
from lora_edge.parity.reference import Reference
from lora_edge.runtime import Runner

if TYPE_CHECKING:
    from lora_edge.parity.around.reference import Parameters

_WEIGHTS = "weights"
# How far numbers may be apart: of embeddings, float noise; of pixels, against goldens, a grey level
# by which releases of Pillow may differ.
_CLOSE: Mapping[str, float] = {asked.EMBEDDINGS: 3e-4, asked.IMAGES: 1e-5}
_GREY_LEVEL = 0.03


@dataclass(frozen=True)
class Held:
    """What a bundle's files hold, compared with the base's and the adapters' own.

    Attributes:
        cases: one for each file, one for all weights, one for each adapter's file.
        parameters: the checkpoint, as transformers loads it.
    """

    cases: Sequence[Case]
    parameters: Parameters


def look_inside(
    bundle: Bundle, reference: Reference, sources: Mapping[str, Path], say: Callable[[str], None]
) -> Held:
    """Compare a bundle's files, before a session is opened: both read every weight.

    Args:
        bundle: the bundle.
        reference: its base in PyTorch, as the checkpoint is.
        sources: adapter -> PEFT directory, of :func:`~lora_edge.parity.question.sources_of`.
        say: called with a line for each part.
    """
    from lora_edge.parity.around.reference import Parameters
    from lora_edge.parity.around.weights import compare_weights

    base = reference.base
    say("checking what lies around the graph against transformers")
    cases = [_case(f"file {name}", said) for name, said in compare_files(bundle, base)]
    parameters = Parameters(reference.bare, reference.task, reference.mapped)
    say("checking every weight against the checkpoint")
    manifest = bundle.manifest
    said = "; ".join(compare_weights(bundle, base, sources, parameters))
    who = tuple(sources) if manifest.mode == "merged" else ()
    cases.append(_case(_WEIGHTS, said, who, kind="weights"))
    if manifest.mode == "switchable":
        for name, directory in sources.items():
            said = compare_tensors(bundle, name, directory, parameters.value)
            cases.append(_case(f"file of {name}", said, (name,), kind="weights"))
    return Held(cases, parameters)


def look_around(
    runner: Runner,
    reference: Reference | None,
    sources: Mapping[str, Path],
    held: Held | None,
    say: Callable[[str], None],
) -> tuple[list[Case], asked.Answers | None]:
    """Compare all that a person gets beside logits, after what the files hold.

    Args:
        runner: of the bundle.
        reference: its base in PyTorch, as the checkpoint is; the bundle's adapters are attached
            on the way. ``None``: PyTorch's answers are those that the bundle keeps.
        sources: adapter -> PEFT directory, of :func:`~lora_edge.parity.question.sources_of`; unused
            without a reference.
        held: of :func:`look_inside`; ``None`` without a reference.
        say: called with a line for each part.

    Returns:
        The cases, and PyTorch's answers, to be kept where all of them are the bundle's too.

    Raises:
        BaseModelError: transformers cannot read the base's files.
    """
    if reference is None or held is None:
        kept = load_around(runner.bundle)
        if kept is None:
            return [], None
        say("checking what lies around the graph against the goldens")
        return list(_answered(runner, kept, goldens=True)), None
    from lora_edge.parity.around.expected import DATED, expected_answers

    attach(reference, runner.bundle, sources)
    wanted = expected_answers(runner, reference, sources, held.parameters)
    cases = [*held.cases, *_answered(runner, wanted, goldens=False)]
    wanted[asked.GRAPH_FILES] = asked.graph_files(runner)
    for aspect in [x for x in wanted if x.partition(asked.OF)[0] == asked.CHAT]:
        own = runner.tokenizer_of(aspect.partition(asked.OF)[2] or None)
        if DATED in "".join(own.templates.values()):
            del wanted[aspect]  # another text tomorrow
    return cases, wanted


def _answered(runner: Runner, wanted: asked.Answers, *, goldens: bool) -> Iterator[Case]:
    found = asked.answers(runner, wanted)
    for aspect, expected in wanted.items():
        close = _CLOSE.get(aspect, 0.0)
        if goldens and aspect == asked.IMAGES:
            close = _GREY_LEVEL
        said = first_difference(aspect, found[aspect], expected, close)
        if aspect == asked.GRAPH_FILES:
            yield _of_graph_files(found[aspect], expected)
        else:
            yield _case(aspect, said)


def _of_graph_files(found: Mapping[str, str], wanted: Mapping[str, str]) -> Case:
    odd = sorted(
        name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)
    )
    if not odd:
        return _case(asked.GRAPH_FILES, "", kind="weights")
    reason = (
        f"{asked.GRAPH_FILES}: {', '.join(odd)} {'are' if len(odd) > 1 else 'is'} not what was "
        "compared with PyTorch, weight by weight; validate with --reference BASE"
    )
    return Case(asked.GRAPH_FILES, (), "unproved", reason, kind="weights")


def _case(
    name: str, said: str, adapters: tuple[str, ...] = (), *, kind: CaseKind = "around"
) -> Case:
    reason = said if not said or said.startswith(name) else f"{name}: {said}"
    return Case(name, adapters, "failed" if said else "passed", reason, kind=kind)
