"""Validation in other runtimes: the golden cases, run by clients of their own."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from lora_edge import types as opt
from lora_edge.bundle.bundle import Bundle, load_bundle
from lora_edge.clients.catalog import command_of, label_of
from lora_edge.errors import DataError
from lora_edge.parity import in_session
from lora_edge.parity.case import Case
from lora_edge.parity.checks import compare
from lora_edge.parity.compare import Tolerance
from lora_edge.parity.drift import HALF_LIMITS, drift, drifts, in_floats
from lora_edge.parity.inside import InsideRunner, tokens_in
from lora_edge.parity.plan.plan import Depth
from lora_edge.parity.record.environment import Opening, session_of
from lora_edge.parity.record.golden import Golden
from lora_edge.parity.record.journal import Journal
from lora_edge.parity.report import Report, Session
from lora_edge.parity.static import fitting
from lora_edge.parity.subjects import subject_of
from lora_edge.runtime import Runner

_SAME = 1e-3  # logits of one graph, whose activations are rounded, in two runtimes


def validate_in(
    clients: Mapping[str, str | None],
    bundle: str | os.PathLike[str] | Bundle,
    *,
    depth: Depth = "normal",
    exact: bool = False,
    progress: in_session.Say | None = None,
) -> Report:
    """Check that a bundle does in other runtimes what PyTorch does.

    Each runs the bundle's golden cases by a driver that reads the adapters' files, feeds the graph
    and keeps the cache by itself, and tokenizes the recorded texts where it has a tokenizer. Limits
    and explanations are those of :func:`~lora_edge.parity.engine.validate`. Of a bundle of few bits
    or of fp16 the graph in floats is compared with PyTorch, and the one that ships, in the client,
    with that.

    Args:
        clients: name of a client, of :data:`~lora_edge.clients.catalog.CLIENTS`, or
            ``command:PROGRAM`` -> where it is: an interpreter, or a folder with ``node_modules``;
            ``None``: this one.
        bundle: the bundle or its folder.
        depth: ``quick``: short prompts and continuations; ``full``: every ordered pair of adapters
            is switched between.
        exact: leave out what int8 activations or float16 add.
        progress: called with a line for each case.

    Raises:
        BundleError: a file of the bundle is damaged.
        OptionError: an unknown client, or one that is not there; or the bundle has two graphs.
        ProcessError: a client cannot open the bundle, or has died.
        DataError: no client, or the bundle has no recorded outputs.
    """
    started = time.monotonic()
    opt.one_of("depth", depth, ("quick", "normal", "full"))
    opt.flag("exact", exact)
    opt.called("progress", progress)
    say = progress or opt.silent
    commands = {label_of(name): command_of(name, place) for name, place in clients.items()}
    if not commands:
        raise DataError("no client was given", "Name one, such as node.")
    target = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    target.verify_all()
    settings = in_session.Settings(
        depth, in_session.QUICK_STEPS if depth == "quick" else None, 0, (), Tolerance()
    )
    goldens = in_session.recorded_cases(target, settings)
    if not goldens:
        raise DataError(
            f"{target.directory} has no recorded outputs to compare with",
            "Export the bundle again, or validate with --reference.",
        )
    opening = Opening(tuple((name, "") for name in commands), {}, False, clients=commands)
    cases: list[Case] = []
    sessions: list[Session] = []
    ran: dict[str, str] = {}
    for name in commands:
        runner = opening.runner(target, name, "")
        assert isinstance(runner, InsideRunner)
        with runner:
            ran[name] = runner.client.about
            if runner.half:
                floats, session, own = in_half(runner, goldens, settings, say)
                cases += own
                sessions += [floats, session]
                continue
            session, own = _session(runner, goldens, settings, say)
            cases += own
            sessions.append(session)
            if drifts(target.manifest) and not exact:
                asked = [golden for golden in goldens if runner.takes(golden.probe)]
                seen = in_session.seen_in_floats(runner, session, asked, say, ranging=False)
                shipped = partial(opening.runner, target, name, "", exact=False)
                cases += _of(session, in_session.drifted(shipped, seen, asked))
    command = _command(target, clients, depth, exact=exact)
    return in_session.report_of(
        target,
        goldens,
        cases,
        sessions,
        settings,
        started=started,
        against="goldens",
        command=command,
        ran=ran,
    )


def _session(
    runner: InsideRunner,
    goldens: Sequence[Golden],
    settings: in_session.Settings,
    say: in_session.Say,
) -> tuple[Session, list[Case]]:
    """Everything but drift in one client."""
    asked, left_out = asked_in(runner, goldens, settings)
    session = runner.seen(left_out)
    cases = list(tokens_in(runner))
    for golden, part in in_session.compared(
        runner, session, asked, Journal(None, {}), settings, say
    ):
        cases += _blamed(runner, golden, part, settings) if _failed(part) else part
    return session, [*cases, *_of(session, in_session.switched(runner, asked, settings))]


def asked_in(
    runner: InsideRunner, goldens: Sequence[Golden], settings: in_session.Settings
) -> tuple[list[Golden], list[str]]:
    """The golden cases that a client can be asked, and what is left out, by name."""
    asked = [golden for golden in goldens if runner.takes(golden.probe)]
    left_out = [golden.probe.name for golden in goldens if not runner.takes(golden.probe)]
    fit = fitting(runner, asked, settings.depth)
    return fit.goldens, [*left_out, *fit.left_out]


def in_half(
    runner: InsideRunner,
    goldens: Sequence[Golden],
    settings: in_session.Settings,
    say: in_session.Say,
) -> tuple[Session, Session, list[Case]]:
    """A client that computes in float16: its graph on the CPU against PyTorch, and then the client
    against that, as drift.

    Returns:
        The session on the CPU, that in the client, and the cases of both.
    """
    asked, left_out = asked_in(runner, goldens, settings)
    exact = Runner(runner.bundle, static=True if runner.room is not None else None)
    floats = session_of(exact, None, left_out)
    pairs = in_session.compared(exact, floats, asked, Journal(None, {}), settings, say)
    cases = [case for _, part in pairs for case in part]
    session = runner.seen(left_out)
    say(f"measuring what float16 adds ({session.name})")
    found = drift(
        runner,
        in_floats(exact, asked),
        asked,
        HALF_LIMITS,
        said=(
            f"{runner.client.name}, which computes in float16,",
            "the same graph on the CPU is exact",
        ),
    )
    cases += _of(session, list(found))
    return floats, session, [*cases, *_of(session, in_session.switched(runner, asked, settings))]


def _failed(cases: Sequence[Case]) -> bool:
    return any(case.status == "failed" for case in cases)


def _blamed(
    runner: InsideRunner, golden: Golden, cases: Sequence[Case], settings: in_session.Settings
) -> list[Case]:
    """The cases of a golden that failed, and what lora-edge's own runner makes of it."""
    own = compare(Runner(runner.bundle, exact=runner.exact), golden, settings.tolerance)
    if _failed(own):
        said = "lora-edge's own runner is wrong here too: it is the bundle, or this machine"
    else:
        said = f"lora-edge's own runner is right with the same files: it is {runner.client.name}"
    part = runner.bundle.manifest.reads
    if part.exact and runner.exact and not golden.probe.part:
        fast = Runner(runner.bundle)
        subject = subject_of(runner.bundle.manifest)
        found, ships = (subject.observe(x, golden.probe, golden.tails) for x in (runner, fast))
        if all(np.allclose(a, b, atol=_SAME) for a, b in zip(found, ships, strict=True)):
            said = f"it gives what {part.file} gives, which rounds its activations: {part.exact} "
            said += "was asked for"
    return [
        replace(case, reason=f"{case.reason}; {said}") if case.status == "failed" else case
        for case in cases
    ]


def _of(session: Session, cases: Sequence[Case]) -> list[Case]:
    return [replace(case, session=session.name) for case in cases]


def _command(
    bundle: Bundle, clients: Mapping[str, str | None], depth: Depth, *, exact: bool
) -> str:
    words = ["lora-edge", "validate", str(bundle.directory)]
    for name, place in clients.items():
        words += ["--in", name]
        words += ["--client", f"{name}={place}"] if place else []
    words += [f"--{depth}"] * (depth != "normal") + ["--exact"] * exact
    return shlex.join(words)
