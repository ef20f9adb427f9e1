"""What one session of a validation compares, whatever runs the graph."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lora_edge.bundle.bundle import Bundle
from lora_edge.bundle.manifest import survival_line
from lora_edge.files.pages import trim
from lora_edge.names import NONE_ADAPTER
from lora_edge.parity.case import Case
from lora_edge.parity.checks import Broken, broken_by, compare, switching
from lora_edge.parity.compare import Tolerance
from lora_edge.parity.drift import InFloats, drift, in_floats, measures_drift
from lora_edge.parity.entries import check_entries
from lora_edge.parity.plan.plan import MIXED_ROWS, Depth
from lora_edge.parity.plan.reach import reach_of
from lora_edge.parity.ranges import Largest, Ranges
from lora_edge.parity.record.environment import machine, versions
from lora_edge.parity.record.golden import Golden, recorded, reduce, shortened
from lora_edge.parity.record.journal import Journal
from lora_edge.parity.report import Against, Report, Session
from lora_edge.runtime import Runner

Say = Callable[[str], None]
Seen = tuple[Mapping[str, InFloats], Mapping[str, Largest]]
"""By name of a probe: what the graph in floats gives, and the largest number that float16 holds."""

QUICK_STEPS = 8


@dataclass(frozen=True)
class Settings:
    """What was asked for; everything but the bundle that the figures depend on."""

    depth: Depth
    steps: int | None
    seed: int
    prompts: tuple[str, ...]
    tolerance: Tolerance

    @property
    def all_pairs(self) -> bool:
        return self.depth == "full"

    def facts(self) -> dict[str, str | int | float | None]:
        return {
            "depth": self.depth,
            "steps": self.steps,
            "seed": self.seed,
            "prompts": len(self.prompts),
            "multiple": self.tolerance.multiple,
            "sensitivity": self.tolerance.sensitivity,
        }


def recorded_cases(bundle: Bundle, settings: Settings) -> list[Golden]:
    """A bundle's golden cases, as far as they are wanted."""
    found = [x for x in recorded(bundle) if settings.depth != "quick" or not x.probe.part]
    steps = settings.steps
    return found if steps is None else [shortened(golden, steps) for golden in found]


def compared(
    runner: Runner,
    session: Session,
    asked: Iterable[Golden],
    journal: Journal,
    settings: Settings,
    say: Say,
) -> Iterator[tuple[Golden, list[Case]]]:
    """Every golden, reduced, with its cases; whole logits of one probe are in memory at a time."""
    count = _probes(runner)
    broken: set[Broken] = set()
    for golden in asked:
        probe = golden.probe
        part = journal.finished(session.name, probe.name)
        if part is None:
            say(f"comparing {probe.name} ({session.name})")
            part = [
                dataclasses.replace(case, kind=probe.kind, session=session.name)
                for case in compare(runner, golden, settings.tolerance, broken)
            ]
            if golden.expected[0].columns is None:
                small = reduce(golden, count)
                journal.finish(session.name, probe.name, part, small)
                broken |= broken_by(probe, part)
                del golden
                trim()
                yield small, part
                continue
            journal.finish(session.name, probe.name, part)
        broken |= broken_by(probe, part)
        yield golden, part


def switched(runner: Runner, goldens: Sequence[Golden], settings: Settings) -> list[Case]:
    """Cases of switching between adapters."""
    found = switching(runner, goldens, settings.tolerance, all_pairs=settings.all_pairs)
    return [dataclasses.replace(case, kind="switch") for case in found]


def seen_in_floats(
    runner: Runner, session: Session, goldens: Sequence[Golden], say: Say, *, ranging: bool
) -> Seen:
    """What drift is measured from, of the graph in floats, and its largest numbers."""
    what = "float16 adds" if runner.bundle.manifest.half else "int8 activations add"
    say(f"measuring what {what} ({session.name})")
    largest = {}
    if ranging:
        ranges = Ranges(runner)
        largest = {x.probe.name: ranges.largest(x) for x in goldens if measures_drift(x)}
        del ranges  # which has a session
    return in_floats(runner, goldens), largest


def drifted(shipped: Callable[[], Runner], seen: Seen, goldens: Sequence[Golden]) -> list[Case]:
    """Cases of drift: the graph that ships, which is opened now, against the one in floats."""
    exact, largest = seen
    return list(drift(shipped(), exact, goldens, largest=largest))


def _probes(runner: Runner) -> int:
    """How many golden cases share the bundle's room: base, blend, each adapter, mixed batches."""
    adapters = len(runner.adapters)
    return 2 + adapters + -(-adapters // (MIXED_ROWS - 2))


def unproved(bundle: Bundle, names: Sequence[str], goldens: Sequence[Golden]) -> Iterable[Case]:
    """A case for each adapter that the goldens do not prove."""
    planned = [g.probe for g in goldens if not g.probe.given]
    covered = {probe.adapters[0] for probe in planned if probe.kind == "adapter"}
    for name in names:
        if name in covered and bundle.adapter(name).proved:
            continue
        case = f"adapter {name}"
        what = "did not pass when it was last" if name in covered else "was never"
        reason = f"{case}: it {what} compared with PyTorch; validate with --reference BASE"
        yield Case(case, (name,), "unproved", reason, kind="proof")


def report_of(
    bundle: Bundle,
    goldens: Sequence[Golden],
    cases: Sequence[Case],
    sessions: Sequence[Session],
    settings: Settings,
    *,
    started: float,
    against: Against,
    command: str,
    ran: Mapping[str, str] | None = None,
    repro: str = "",
    fewer: str = "",
) -> Report:
    """The report of all sessions of a validation.

    Args:
        bundle: the bundle.
        goldens: what was run.
        cases: what the sessions found.
        sessions: how the bundle was run.
        settings: what was asked for.
        started: on the monotonic clock, in seconds.
        against: where the expected outputs came from.
        command: a command line that makes the report again.
        ran: further packages and versions, or clients and what ran there.
        repro: folder of the reproduction of the first failure.
        fewer: why fewer prompts were taken than were asked for.
    """
    names = tuple(sorted(set(bundle.manifest.adapters) - {NONE_ADAPTER}))
    packages = versions()
    for golden in goldens:
        packages |= golden.versions
    proof = unproved(bundle, names, goldens) if against == "goldens" else ()
    return Report(
        bundle=str(bundle.directory),
        mode=bundle.manifest.mode,
        against=against,
        adapters=names,
        cases=(*cases, *check_entries(bundle), *proof),
        versions={**packages, **(ran or {})},
        seconds=time.monotonic() - started,
        sessions=tuple(sessions),
        machine=machine(),
        settings=settings.facts(),
        base=bundle.manifest.base["name_or_path"],
        command=command,
        repro=repro,
        reach=reach_of(bundle, goldens, fewer),
        survival=survival_line(bundle.manifest),
    )
