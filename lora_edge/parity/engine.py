"""Validation: a bundle against PyTorch now, or against the golden cases recorded from it."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

from lora_edge import types as opt
from lora_edge.base.checkpoint import Base, resolve_base
from lora_edge.bundle.bundle import Bundle, load_bundle
from lora_edge.errors import DataError
from lora_edge.files.changing import recover
from lora_edge.files.pages import trim
from lora_edge.names import NONE_ADAPTER
from lora_edge.parity.around import Held, look_around, look_inside
from lora_edge.parity.ask import ask, open_base
from lora_edge.parity.case import Case
from lora_edge.parity.compare import Tolerance
from lora_edge.parity.drift import drifts
from lora_edge.parity.evaluate.evaluate import check_examples, evaluate
from lora_edge.parity.explain.explain import explain
from lora_edge.parity.in_parts import cut_of, fewer_prompts
from lora_edge.parity.in_session import (
    QUICK_STEPS,
    Say,
    Seen,
    Settings,
    compared,
    drifted,
    recorded_cases,
    report_of,
    seen_in_floats,
    switched,
)
from lora_edge.parity.plan.examples import Example
from lora_edge.parity.plan.plan import Depth
from lora_edge.parity.question import sources_of
from lora_edge.parity.record.environment import (
    Opening,
    combinations,
    session_of,
    weight_bytes,
)
from lora_edge.parity.record.golden import Golden, recorded
from lora_edge.parity.record.journal import Journal
from lora_edge.parity.record.record import record
from lora_edge.parity.reference import Reference
from lora_edge.parity.report import Report, Session
from lora_edge.parity.request import command_line, journal_key
from lora_edge.parity.static import first_whole, fitting, static_runs

_LARGE = 64 << 20  # bytes of weights of which there should be no second copy for long
_SWITCHING, _DRIFT = "switching", "drift"


def validate(
    bundle: str | os.PathLike[str] | Bundle,
    reference: str | os.PathLike[str] | Base | Reference | None = None,
    *,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    provider: str | Sequence[str] = "cpu",
    provider_options: Mapping[str, str] | None = None,
    allow_fallback: bool = False,
    optimization: str | Sequence[str] | None = None,
    depth: Depth = "normal",
    steps: int | None = None,
    seed: int = 0,
    prompts: Sequence[str] = (),
    examples: Sequence[Example] = (),
    metric: str | None = None,
    resume: str | os.PathLike[str] | None = None,
    repro: str | os.PathLike[str] | None = None,
    exact: bool = False,
    low_memory: bool = False,
    progress: Say | None = None,
) -> Report:
    """Check that a bundle does what PyTorch does.

    With ``reference``, against eager PEFT in float32. The manifest then says of each adapter
    whether it is proved; the golden cases of one that passes for the first time are recorded, and
    one that fails is unproved until it passes again. Without, against the golden cases (needs no
    PyTorch); an unproved adapter is not a pass.

    Every adapter state runs in every session: each provider with each level of optimization. The
    first session is compared with whole logits, the others with those that a golden case keeps.
    Of a bundle of few bits or of fp16 these are sessions on the graph that computes in float32.
    What int8 activations or float16 add in the graph that ships is measured beside it, once for
    each provider.

    Args:
        bundle: the bundle or its folder.
        reference: the base model: a folder, a hub id, an open base, or the base in PyTorch with no
            adapter attached.
        adapters: PEFT directories of adapters whose files the bundle does not hold.
        provider: one or several execution providers of the bundle's side.
        provider_options: own options of the one of them that is not ``cpu``.
        allow_fallback: let the CPU run what a provider does not take.
        optimization: one or several of ``disable``, ``basic``, ``extended`` and ``all``; ``None``:
            ``all``, or with ``depth="full"`` each of them.
        depth: ``quick``: continuations of 8 tokens, short prompts, small batches; ``full``: every
            level of optimization, every ordered pair of adapters is switched between, not each with
            its successor, and (with ``reference``) prompts up to the longest and continuations of
            256 tokens.
        steps: greedy tokens after each prompt (with ``reference``); ``None``: 64, or 16 for a base
            of more than 20 M parameters.
        seed: of the random prompts.
        prompts: texts to run besides random tokens (with ``reference``), four at most.
        examples: prompts and completions, or texts and labels, on which the ``metric`` of each
            adapter is compared too (with ``reference``), in the first session.
        metric: ``exact_match`` or ``perplexity`` of prompts and completions, ``accuracy`` of texts
            and labels; ``None``: the first that the bundle's task has.
        resume: a folder for the parts that are finished. A validation that was cut off goes on
            from it when called again; it is removed at the end.
        repro: a folder for the smallest reproduction of the first failure: what the graph is fed,
            both outputs, and a script that needs numpy and ONNX Runtime alone.
        exact: leave out what int8 activations or float16 add; of a bundle of few bits or of fp16
            the graph in float32 alone is then judged.
        low_memory: with ``reference``, and of a base of more than 50 million numbers. A bundle in
            float32: run its graphs in parts, on weights that are read anew for each. It takes
            longer, and it is not the whole graph that ONNX Runtime optimizes; the report says so.
            A bundle of few bits of a base of more than 5 billion: compare the prompts of ``quick``
            where ``depth`` is ``normal``; the report says so, too.
        progress: called with a line for each probe.

    Raises:
        BundleError: a file of the bundle is damaged, or the reference is another base.
        AdapterError: a given PEFT directory is not the adapter that was exported.
        DataError: an unknown level or metric, ``examples`` without a reference, or ``resume`` names
            a folder with other files.
        MissingDependencyError: a reference is given, and torch, transformers or peft is missing.
    """
    started = time.monotonic()
    if not isinstance(depth, str) or depth not in get_args(Depth):
        raise DataError(f"depth is {depth!r}", f"Depths are {', '.join(get_args(Depth))}.")
    if steps is not None:
        opt.whole("steps", steps, 1)
    opt.whole("seed", seed, 0)
    opt.texts("provider", provider)
    provider_options = opt.pairs("provider_options", provider_options or {})
    opt.flag("allow_fallback", allow_fallback)
    opt.flag("exact", exact)
    opt.flag("low_memory", low_memory)
    opt.texts("optimization", optimization or ())
    opt.paths("adapters", adapters or {})
    opt.words("prompts", prompts)
    for example in opt.listed("examples", examples):
        if not isinstance(example, Example):
            raise opt.refused("an entry of examples", example, "an Example")
    if metric is not None:
        opt.text("metric", metric)
    for name, folder in (("resume", resume), ("repro", repro)):
        if folder is not None:
            opt.path(name, folder)
    opt.called("progress", progress)
    say = progress or opt.silent
    target = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    if reference is not None:  # what is proved will be recorded
        recover(target.directory)
    target.verify_all()
    if examples and reference is None:
        raise DataError(
            "there is nothing to compare the metric with",
            "Give the base as reference; the goldens of the user's prompts work without it.",
        )
    model: Reference | None = None
    base: Base | None = None
    if isinstance(reference, Reference):
        model, base = reference, reference.base
    elif reference is not None:
        base = reference if isinstance(reference, Base) else resolve_base(reference)
    fewer = ""
    if low_memory and base is not None:
        fewer = fewer_prompts(base, target.manifest.quantization, depth)
    if fewer:
        say(fewer)
        depth = "quick"
    if steps is None and depth == "quick":
        steps = QUICK_STEPS
    settings = Settings(depth, steps, seed, tuple(prompts), Tolerance())
    wanted = combinations(provider, optimization, full=depth == "full")
    if low_memory and (reference is None or any(name != "cpu" for name, _ in wanted)):
        raise opt.refused(
            "low_memory",
            low_memory,
            "False without a reference, or with another provider than cpu",
            "Recorded outputs are compared on the whole graph.",
        )
    opening = Opening(tuple(wanted), dict(provider_options or {}), allow_fallback)
    if base is not None:
        first_whole(target, wanted[0][0])
    if examples:
        check_examples(target, examples, metric)
    journal = Journal(
        None if resume is None else Path(resume),
        journal_key(target, base, settings, wanted[0], low_memory=low_memory),
    )
    names = tuple(sorted(set(target.manifest.adapters) - {NONE_ADAPTER}))
    cases: list[Case] = []
    sessions: list[Session] = []
    goldens: list[Golden] = []
    left = ""
    sources: Mapping[str, Path] = {}
    held: Held | None = None
    if base is not None:  # before there is a session, which has a copy of the weights
        sources = sources_of(target, base, names, adapters or {})
        model = model or open_base(target, base, sources)
        if low_memory:
            opening = _in_parts(opening, model, target)
        held = look_inside(target, model, sources, say)
        trim(cycles=model.large)
    big = weight_bytes(target) > _LARGE
    for index, (name, level, static) in enumerate(static_runs(target, wanted)):
        runner = opening.runner(target, name, level, static=static)
        if index == 0 and base is None:
            goldens = recorded_cases(target, settings)
        fit = fitting(runner, goldens, depth)
        session = session_of(runner, level, fit.left_out)
        sessions.append(session)
        asked: Iterable[Golden] = fit.goldens
        if index == 0:
            around, answers = look_around(runner, model, sources, held, say)
            cases += [dataclasses.replace(case, session=session.name) for case in around]
        if index == 0 and model is not None:
            asked = ask(
                runner,
                model,
                sources,
                say,
                steps=steps,
                seed=seed,
                prompts=prompts,
                given=[golden.probe for golden in recorded(target) if golden.probe.given],
                done=tuple(journal.goldens),
                depth=depth,
            )
        found: list[Golden] = []
        own: list[Case] = []
        for golden, part in compared(runner, session, asked, journal, settings, say):
            own += part
            found.append(golden)
        if index == 0 or not session.graph:
            goldens = found
        explained = any(case.status == "failed" and case.figures for case in cases)
        if not explained and not session.graph:  # whose prompts are several runs
            wanted_repro = None if repro is None else Path(repro)
            own, left = explain(runner, own, goldens, model, wanted_repro, settings.tolerance, say)
        cases += own
        measured = partial(switched, runner, found, settings)
        cases += _once(_SWITCHING, session, journal, measured)
        drifting = drifts(target.manifest) and not exact
        if drifting:
            unknown = name not in (first for first, _ in wanted[:index])
            seen: Seen = ({}, {})
            if unknown and journal.finished(session.name, _DRIFT) is None:
                ranging = target.manifest.half and model is not None
                seen = seen_in_floats(runner, session, goldens, say, ranging=ranging)
            # A session has a copy of the weights: this one ends before the next is opened.
            del runner, measured
            trim(cycles=big)  # a Runner holds itself
            if unknown:
                shipped = partial(opening.runner, target, name, level, exact=False)
                cases += _once(_DRIFT, session, journal, partial(drifted, shipped, seen, goldens))
        if index == 0 and model is not None and examples:
            floors = {name: floor for golden in goldens for name, floor in golden.floors.items()}
            if drifting:  # of few bits or float16, what the user's answers come from
                trim(cycles=big)
                runner = opening.runner(target, name, level, exact=False)
            cases += [
                dataclasses.replace(case, session=session.name)
                for case in evaluate(
                    runner, model, examples, metric, floors, settings.tolerance, say
                )
            ]
    report = report_of(
        target,
        goldens,
        cases,
        sessions,
        settings,
        started=started,
        against="goldens" if base is None else "reference",
        command=command_line(
            target, base, adapters or {}, opening, settings, exact=exact, low_memory=low_memory
        ),
        repro=left,
        fewer=fewer,
    )
    if base is not None:
        record(target, report, [x for x in goldens if x.probe.kept], answers, say)
    journal.close()
    return report


def _in_parts(opening: Opening, reference: Reference, bundle: Bundle) -> Opening:
    """With the bundle's graphs in parts where neither side should have the model in memory."""
    return dataclasses.replace(opening, cut=cut_of(reference, bundle.manifest.quantization))


def _once(
    name: str, session: Session, journal: Journal, measured: Callable[[], list[Case]]
) -> list[Case]:
    """Cases of a session, measured unless an earlier run of this journal has finished them."""
    part = journal.finished(session.name, name)
    if part is None:
        part = [dataclasses.replace(case, session=session.name) for case in measured()]
        journal.finish(session.name, name, part)
    return part
