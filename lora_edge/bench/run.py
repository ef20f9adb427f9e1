"""A plan, run from end to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lora_edge.bench.plan import Entry, Plan, Settings, Taker
from lora_edge.bench.results import results
from lora_edge.bench.rounds import Costs, run_round
from lora_edge.clients.process import Process, ProcessError

Say = Callable[[str], None]


def run(plan: Plan, settings: Settings, about: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Measure everything, in fresh processes.

    Args:
        plan: what is measured; a contestant that cannot run is left out, with its reason.
        settings: how.
        about: what the bundle is, for the JSON.
        say: called with a line of progress.

    Returns:
        The JSON of :func:`lora_edge.bench.results.results`.

    Raises:
        ProcessError: the reference cannot run, or a contestant failed in the middle.
        ParityError: contestants that should compute the same do not.
    """
    ready = tried(plan, settings, say)
    rounds: list[Costs] = []
    for index in range(settings.processes):
        rounds.append(run_round(ready, settings, index))
        say(f"process {index + 1} of {settings.processes} of each contestant done")
    return results(ready, settings, rounds, about)


def tried(plan: Plan, settings: Settings, say: Say) -> Plan:
    """The plan without those that cannot run, which are named with their reason.

    Raises:
        ProcessError: a figure would be left without its reference.
    """
    references = {taker.entry for figure in plan.figures for taker in figure.takers[:2]}
    left, runs = dict(plan.left_out), dict(plan.runs)
    gone: set[str] = set()
    for entry in plan.entries:
        takers = [x for figure in plan.figures for x in figure.takers if x.entry == entry.key]
        if not takers:
            continue
        try:
            runs[entry.key] = _try(entry, takers, settings)
        except ProcessError as error:
            if entry.key in references:
                raise
            gone.add(entry.key)
            left[entry.key] = " ".join(str(error).removeprefix(f"{entry.key}: ").split())
            say(f"{entry.key} is left out: {left[entry.key]}")
    figures = [
        replace(figure, takers=tuple(x for x in figure.takers if x.entry not in gone))
        for figure in plan.figures
    ]
    return replace(plan, figures=figures, left_out=left, runs=runs)


def _try(entry: Entry, takers: list[Taker], settings: Settings) -> str:
    """Open a contestant and run one token as it will be asked to; what runs there."""
    with Process(entry.key, entry.command, single=settings.threads == 1) as process:
        given = {**entry.given, "threads": settings.threads}
        about = str(process.ask("open", player=entry.player, given=given)["about"])
        for adapters in {x.adapters for x in takers if x.work in ("decode", "prefill")}:
            rows = [[1]] * len(adapters)
            chosen = list(adapters)
            process.ask("start", key="", rows=rows, adapters=chosen, room=2, together=True)
    return about
