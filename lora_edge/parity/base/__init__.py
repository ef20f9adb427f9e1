"""The base check: a captured graph, without adapters, against eager PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_edge.errors import CaptureError
from lora_edge.parity.base.decoder import DecoderTrial
from lora_edge.parity.base.encoder import EncoderTrial
from lora_edge.parity.base.encoder_decoder import EncoderDecoderTrial
from lora_edge.parity.base.trial import Captured, Trial, running
from lora_edge.parity.compare import Tolerance, noise
from lora_edge.parity.in_parts import cut_of
from lora_edge.parity.plan.states import BASE
from lora_edge.parity.reference import Reference
from lora_edge.parity.subjects.encoder import by_position
from lora_edge.tasks.task import Driver, Task

_TRIALS: Mapping[Driver, type[Trial]] = {
    "decoder": DecoderTrial,
    "encoder": EncoderTrial,
    "encoder-decoder": EncoderDecoderTrial,
}


def check_base(
    graph: Captured,
    task: Task,
    reference: Reference,
    *,
    seed: int = 0,
    tolerance: Tolerance | None = None,
) -> dict[str, Any]:
    """Compare captured graphs with eager PyTorch in float32.

    Args:
        graph: the capture.
        task: what it was captured for.
        reference: the base that it was captured from in PyTorch, without adapters.
        seed: of the random inputs.
        tolerance: how limits follow from the measured floor.

    Returns:
        JSON-ready figures: floor, limit, each case's errors, and what was covered.

    Raises:
        CaptureError: a case is beyond its limit, or proves nothing; names the case.
    """
    tolerance = tolerance or Tolerance()
    base = reference.base
    trial = _TRIALS[task.driver](graph, base, reference.parameters, seed)
    trial.cut = cut_of(reference)
    states = [BASE] * len(trial.rows)
    found = reference.outputs(trial.rows, states)
    expected = [by_position(row).astype(np.float32, copy=False) for row in found]
    # Of long rows the floor is measured on the beginning: float64 is slow.
    count = len(trial.rows) if trial.measured is None else trial.measured
    sample = [{key: x[: trial.longest] for key, x in row.items()} for row in trial.rows[:count]]
    with reference.wide():
        wide = reference.outputs(sample, states[:count])
    floor = noise(
        [row[: trial.longest] for row in expected[:count]], [by_position(row) for row in wide]
    )
    if said := trial.senseless(expected, floor, tolerance):
        raise CaptureError(said, "Are its weights trained?")
    cases: dict[str, dict[str, float]] = {}
    whose = f"{base.name_or_path} differ{'s' * (len(graph.parts) == 1)} from PyTorch"
    graphs = "graph" if len(graph.parts) == 1 else "graphs"
    cases_of = trial.cases()
    while True:
        with running(base):
            case = next(cases_of, None)
        if case is None:
            break
        wanted = [
            expected[row][start : start + len(got)]
            for (row, start), got in zip(case.places, case.outputs, strict=True)
        ]
        verdict, cases[case.name] = trial.judged(case, wanted, floor, tolerance)
        if verdict:
            raise CaptureError(
                f"the captured {graphs} of {whose}: {verdict}",
                "Try the other form or backend, and report the model; this capture is not used.",
            )
    return {
        "cases": cases,
        "floor": floor.logit,
        "limit": tolerance.multiple * floor.logit,
        **trial.facts(),
    }
