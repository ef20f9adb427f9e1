"""One golden case against a runner: closeness and effect, controls, switching.

What a probe's rows and tails are to a bundle is its subject's affair.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

from lora_edge.bundle.onnx_adapter import read_adapter
from lora_edge.errors import BundleError
from lora_edge.files.spilled import by_rows
from lora_edge.maths.lora import FloatArray
from lora_edge.names import NONE_ADAPTER, SELECT, lora_input
from lora_edge.parity.case import Case
from lora_edge.parity.compare import Expected, Tolerance, expect, judge, limits, measure
from lora_edge.parity.entries import contradiction
from lora_edge.parity.explain.diagnosis import diagnose
from lora_edge.parity.explain.experiments import Experiments
from lora_edge.parity.explain.failure import Failure, errors_of, within
from lora_edge.parity.plan.states import Probe, Row, State, label
from lora_edge.parity.record.golden import Golden
from lora_edge.parity.subjects import subject_of
from lora_edge.runtime import Runner

_SWITCHED_STEPS = 8

Tensors = dict[str, FloatArray]
Broken = tuple[str, tuple[str, ...]]
"""``alone`` or ``mixed``, and the adapters (none: the base) whose short prompts failed there."""

Trial = tuple[str, Sequence[Expected], Sequence[FloatArray]]
"""A deliberate fault: what it is, and what is then compared."""


def broken_by(probe: Probe, cases: Sequence[Case]) -> set[Broken]:
    """What failed, if it is of those that others build on."""
    if probe.part or probe.kind == "blend":
        return set()
    kind = "mixed" if probe.kind == "mixed" else "alone"
    return {(kind, case.adapters) for case in cases if case.status == "failed"}


def compare(
    runner: Runner,
    golden: Golden,
    tolerance: Tolerance,
    broken: Collection[Broken] = (),
) -> list[Case]:
    """One case for a probe; one for each row of a mixed batch, compared with that row alone.

    Args:
        runner: of the bundle.
        golden: what is expected.
        tolerance: how limits follow from floors.
        broken: what failed and was explained, so that what goes further need not be.
    """
    probe = golden.probe
    actual = golden.observed
    if actual is None:
        actual = _observe(runner, probe, golden.tails)
    for index, (wanted, logits) in enumerate(zip(golden.expected, actual, strict=True)):
        if wanted.length != len(logits):
            raise BundleError(
                f"the golden case {probe.name} has {wanted.length} positions of row {index}, the "
                f"bundle gives {len(logits)}",
                "Export the bundle again.",
            )
    if probe.kind == "mixed":
        row = "mixed row" if probe.batch == 1 else f"batch {probe.batch}, mixed row"
        of = f" of {len(probe.rows)}" if probe.part else ""
        cases = [
            _judged(
                f"{row} {index}{of}: {label(state)}",
                state,
                [golden.expected[index]],
                [actual[index]],
                golden,
                tolerance,
            )
            for index, state in enumerate(probe.states)
        ]
        return [
            _said(runner, golden, case, actual, broken, index) for index, case in enumerate(cases)
        ]
    state = probe.states[0]
    case = _judged(probe.name, state, golden.expected, actual, golden, tolerance)
    if probe.kind == "adapter" and case.status == "passed" and not probe.part:
        switchable = runner.bundle.manifest.mode == "switchable"
        trials = _faulty_runs(runner, golden) if switchable else _faulty_outputs(golden, actual)
        return [_controlled(golden, case, trials, tolerance)]
    return [_said(runner, golden, case, actual, broken)]


def _said(
    runner: Runner,
    golden: Golden,
    case: Case,
    actual: Sequence[FloatArray],
    broken: Collection[Broken],
    row: int | None = None,
) -> Case:
    """The case, and of one that failed what kind of wrong it is."""
    if case.status != "failed":
        return case
    probe = golden.probe
    if probe.part and ("alone", case.adapters) in broken:
        who = f"adapter {case.adapters[0]}" if case.adapters else "the base"
        reason = f"{case.reason}; short prompts of {who} fail too: see there"
        return dataclasses.replace(case, reason=reason)
    if probe.part and probe.kind == "mixed" and any(kind == "mixed" for kind, _ in broken):
        reason = f"{case.reason}; smaller mixed batches fail too: see there"
        return dataclasses.replace(case, reason=reason)
    return _explained(runner, golden, case, actual, row)


def switching(
    runner: Runner, goldens: Sequence[Golden], tolerance: Tolerance, *, all_pairs: bool = False
) -> list[Case]:
    """A -> B -> A, bit for bit, for the base and each adapter with its successor, or all others."""
    plain = [g for g in goldens if not g.probe.given and not g.probe.part]
    probes = [g for g in plain if g.probe.kind in {"base", "adapter"}]
    cases: list[Case] = []
    ran = _Ran(runner, pair=len(probes) == 2)
    for index, golden in enumerate(probes):
        others = [*probes[index + 1 :], *probes[:index]]
        chosen = others[: None if all_pairs else 1]
        cases += [_switched(ran, golden, other, tolerance) for other in chosen]
    return cases


class _Ran:
    """The latest runs, and what ran before each: what is known need not run again.

    Args:
        runner: of the bundle.
        pair: there are two cases only, so that nothing else can run before either of them.
    """

    def __init__(self, runner: Runner, *, pair: bool) -> None:
        self.runner = runner
        self._pair = pair
        # By stem, the latest last, two at most; with the stem of what ran before.
        self._found: dict[str, tuple[list[FloatArray], str]] = {}

    def now(self, golden: Golden) -> list[FloatArray]:
        """Run a case."""
        before = next(reversed(self._found), "")
        found = _shortly(self.runner, golden)
        self._found.pop(golden.stem, None)
        self._found[golden.stem] = found, before
        while len(self._found) > 2:
            del self._found[next(iter(self._found))]
        return found

    def before(self, golden: Golden, other: Golden) -> list[FloatArray]:
        """What a case gives when the other one did not run just before, where that can be."""
        found, was = self._found.get(golden.stem, (None, ""))
        if found is None or (was == other.stem and not self._pair):
            return self.now(golden)
        return found

    def last(self, golden: Golden) -> None:
        """Have a case be the one that ran last."""
        if next(reversed(self._found), "") != golden.stem:
            self.now(golden)


def _switched(ran: _Ran, golden: Golden, other: Golden, tolerance: Tolerance) -> Case:
    runner = ran.runner
    first = ran.before(golden, other)
    ran.last(other)
    again = ran.now(golden)
    one, two = (label(each.probe.states[0]) for each in (golden, other))
    name = f"{one} -> {two} -> {one}, bit for bit"
    if _same(first, again):
        return Case(name, golden.probe.adapters, "passed")
    limit = tolerance.multiple * golden.floors[one].logit
    was, came = (within(errors_of(golden.expected, each), limit) for each in (first, again))
    if came and not was:
        said = (
            f"its first run is wrong, and the one after {two} is right: what ran before it was "
            f"still in effect, and {two} has no part in it"
        )
    elif not _same(_shortly(runner, golden), _shortly(runner, golden)):
        said = f"its outputs differ from run to run, also where nothing else, {two} or other, ran"
    else:
        said = f"its outputs differ after {two} was used in between"
        said += ", and are within the limit all the same" if was and came else ""
    return Case(name, golden.probe.adapters, "failed", f"{one}: {said}")


def _shortly(runner: Runner, golden: Golden) -> list[FloatArray]:
    return _observe(runner, golden.probe, [tail[:_SWITCHED_STEPS] for tail in golden.tails])


def _same(one: Sequence[FloatArray], other: Sequence[FloatArray]) -> bool:
    return all(_same_row(a, b) for a, b in zip(one, other, strict=True))


def _same_row(one: FloatArray, other: FloatArray) -> bool:
    if one.shape != other.shape:
        return False
    parts = by_rows(one, other)
    return all([np.array_equal(one[part], other[part], equal_nan=True) for part in parts])


def _judged(
    name: str,
    state: State,
    expected: Sequence[Expected],
    actual: Sequence[FloatArray],
    golden: Golden,
    tolerance: Tolerance,
) -> Case:
    floor = golden.floors[label(state)]
    figures = measure(expected, actual, floor, tolerance)
    limit = limits(figures, floor, tolerance, has_effect=bool(state))
    verdict = judge(name, figures, limit, tolerance, has_effect=bool(state))
    adapters = tuple(adapter for adapter, _ in state)
    return Case(name, adapters, verdict.status, verdict.reason, figures, limit)


def _explained(
    runner: Runner,
    golden: Golden,
    case: Case,
    actual: Sequence[FloatArray],
    row: int | None = None,
) -> Case:
    """The failed case with a clause on what kind of wrong it is; ``row``: of a mixed batch."""
    probe, chosen = golden.probe, slice(None) if row is None else slice(row, row + 1)
    state = probe.states[row or 0]
    names = sorted(set(runner.bundle.manifest.adapters) - {NONE_ADAPTER})
    subject = subject_of(runner.bundle.manifest)
    bench = Experiments(runner, subject, probe, golden.tails, row, state, names)
    marks, invoked = bench.marks()
    pairs = zip(probe.rows, golden.tails, strict=True)
    longest = max(map(len, probe.rows))
    failure = Failure(
        [(*prompt, *tail) for prompt, tail in pairs][chosen],
        golden.prompts[chosen],
        golden.expected[chosen],
        actual[chosen],
        limit=case.limits.logit if case.limits else 0.0,
        padded=[len(prompt) < longest for prompt in probe.rows][chosen],
        of_mixed=row is not None,
        causal=subject.behind,
        headed=subject.headed,
        marks=marks,
        invoked=invoked,
        rested=bool(probe.rests),
    )
    clause = contradiction(runner.bundle, case.adapters) or diagnose(failure, bench)
    return dataclasses.replace(case, reason=f"{case.reason}; {clause}") if clause else case


def _controlled(golden: Golden, case: Case, trials: Iterable[Trial], tolerance: Tolerance) -> Case:
    """Make the comparison with deliberate faults; it must fail with each of them."""
    errors: dict[str, float] = {}
    survived: list[str] = []
    for fault, expected, actual in trials:
        found = _judged(case.name, golden.probe.states[0], expected, actual, golden, tolerance)
        if found.figures is not None:
            errors[fault] = found.figures.effect_error
        if found.status != "failed":
            survived.append(fault)
    if survived:
        reason = f"{case.name}: the check does not notice when it is {' or '.join(survived)}"
        return dataclasses.replace(case, status="unproved", reason=reason, controls=errors)
    return dataclasses.replace(case, controls=errors)


def _faulty_runs(runner: Runner, golden: Golden) -> Iterator[Trial]:
    """The prompts run again with other tensors in the adapter's place."""
    name = golden.probe.adapters[0]
    expected = [
        row.first(length) for row, length in zip(golden.expected, golden.prompts, strict=True)
    ]
    for fault, tensors in _faults(runner, name):
        runner.override(name, tensors)
        try:
            yield fault, expected, _observe(runner, golden.probe, [()] * len(expected))
        finally:
            runner.override(name, None)


def _faulty_outputs(golden: Golden, actual: Sequence[FloatArray]) -> Iterator[Trial]:
    """A merged adapter cannot be taken out: its outputs, or what is expected, are exchanged.

    The base's logits must not pass for the adapter's, nor the bundle's own outputs where the
    opposite effect is expected. Both are at the kept columns, which are taken for the vocabulary.
    """
    bases = [row.reference if row.base is None else row.base for row in golden.expected]
    rows = list(zip(golden.expected, bases, strict=True))
    yield "absent", [expect(row.reference, base) for row, base in rows], bases
    opposite = [expect(base - (row.reference - base), base) for row, base in rows]
    own = [
        logits if row.columns is None else np.take_along_axis(logits, row.columns, -1)
        for row, logits in zip(golden.expected, actual, strict=True)
    ]
    yield "expected to do the opposite", opposite, own


def _faults(runner: Runner, name: str) -> Iterator[tuple[str, Tensors]]:
    own = _tensors(runner, name)
    # A head stays: without it everything would differ, and nothing be said of the rest.
    heads = {key: value for key, value in own.items() if key.endswith((".W", ".c"))}
    kept = {key for key in own if key == SELECT or key.endswith((".A", ".gate"))} | set(heads)
    yield "zeroed", {key: value * (1 if key in kept else 0) for key, value in own.items()}
    for other in runner.adapters:
        tensors = _tensors(runner, other)
        shared = own.keys() & tensors.keys()
        if other != name and not all(np.array_equal(own[key], tensors[key]) for key in shared):
            yield f"replaced by {other}", {**tensors, **heads}
            return
    reads = {lora_input(path, "A") for path in runner.session.sites}
    if not any(own[key].size for key in reads & set(own)):
        return
    yield (
        "given its inputs in reverse order",
        {key: value[::-1] if key in reads else value for key, value in own.items()},
    )


def _tensors(runner: Runner, name: str) -> Tensors:
    return read_adapter(runner.bundle.verify(runner.bundle.adapter(name).file))


def _observe(runner: Runner, probe: Probe, tails: Sequence[Row]) -> list[FloatArray]:
    return subject_of(runner.bundle.manifest).observe(runner, probe, tails)
