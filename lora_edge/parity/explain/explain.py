"""What is left behind of failures: the layers where they begin, and the smallest reproduction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lora_edge.errors import BundleError
from lora_edge.parity.case import Case
from lora_edge.parity.compare import Tolerance
from lora_edge.parity.explain.localise import Divergence, localise
from lora_edge.parity.explain.repro import worst_row, write_repro
from lora_edge.parity.record.golden import Golden
from lora_edge.parity.reference import Reference
from lora_edge.runtime import Runner

_MOST = 4  # probes whose layers are compared: each costs a run in float64


def explain(
    runner: Runner,
    cases: Sequence[Case],
    goldens: Sequence[Golden],
    reference: Reference | None,
    repro: Path | None,
    tolerance: Tolerance,
    progress: Callable[[str], None],
) -> tuple[list[Case], str]:
    """Compare layers where cases failed (with PyTorch at hand), and reproduce the first of them.

    What another failure explains is left alone: blends and mixed rows of an adapter that fails
    alone, and what goes further than its short prompts, where these fail.

    Args:
        runner: of the session in which they failed.
        cases: of that session.
        goldens: what they were compared with; reduced ones will do.
        reference: the bundle's model in PyTorch; ``None``: layers are not compared.
        repro: folder of the reproduction; ``None``: none is wanted.
        tolerance: gives the multiple.
        progress: called with a line for each probe.

    Returns:
        The cases, with layers, and where the reproduction is (empty: there is none).
    """
    todo = list(_first_failures(cases, goldens))[:_MOST]
    if not todo:
        return list(cases), ""
    found = list(cases)
    left = ""
    for index, golden, row in todo:
        case = found[index]
        chosen = worst_row(runner, golden, tolerance) if row is None else row
        divergence: Divergence | None = None
        if reference is not None:
            progress(f"comparing the layers of {case.name}")
            divergence = localise(runner, reference, golden, chosen, tolerance)
            reason = f"{case.reason}; {divergence.text}"
            case = dataclasses.replace(case, reason=reason, layers=divergence.shown)
            found[index] = case
        if repro is not None and not left:
            try:
                written = write_repro(repro, runner, golden, divergence, chosen, tolerance)
            except (BundleError, OSError) as error:  # the verdict matters more
                progress(f"no reproduction is left: {error}")
                repro = None
                continue
            left = "" if written is None else str(repro)
    return found, left


def _first_failures(
    cases: Sequence[Case], goldens: Sequence[Golden]
) -> list[tuple[int, Golden, int | None]]:
    """What failed by itself: place among the cases, golden, and its row where it is of one."""
    probes = {golden.probe.name: golden for golden in goldens}
    mixed = [golden for golden in goldens if golden.probe.kind == "mixed"]
    failed = [
        (index, case)
        for index, case in enumerate(cases)
        if case.status == "failed" and case.figures is not None
    ]
    if any(case.kind == "base" for _, case in failed):
        failed = [(index, case) for index, case in failed if case.kind == "base"]
    alone = {case.adapters for _, case in failed if case.kind == "adapter"}
    # A mixed batch has a case for each of its rows, in their order.
    own = [index for index, case in enumerate(cases) if case.kind == "mixed"]
    places = [(golden, row) for golden in mixed for row in range(len(golden.probe.rows))]
    rows = dict(zip(own, places, strict=True))
    short = {case.adapters for _, case in failed if _is_short(case, probes)}
    found: list[tuple[int, Golden, int | None]] = []
    for index, case in failed:
        further = case.name in probes and probes[case.name].probe.part
        if further and case.adapters in short:
            continue
        shared = case.kind in {"blend", "mixed"}
        if shared and any((name,) in alone for name in case.adapters):
            continue
        if case.kind == "mixed":
            golden, row = rows[index]
            found.append((index, golden, row))
        elif case.name in probes:
            found.append((index, probes[case.name], None))
    return found


def _is_short(case: Case, probes: Mapping[str, Golden]) -> bool:
    own = case.kind in {"base", "adapter"} and case.name in probes
    return own and not probes[case.name].probe.part
