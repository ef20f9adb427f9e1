"""The base check of an encoder and a decoder: against eager PyTorch, before anything is built.

Covers what captures are known to get wrong: rows of unequal lengths on both sides, one row, rows
longer than the traced ones and than the reach of relative positions, the start token alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_edge.base.checkpoint import Base
from lora_edge.bundle.manifest import Seq2SeqSpec
from lora_edge.errors import CaptureError
from lora_edge.parity.base.decoder import Captured
from lora_edge.parity.compare import Tolerance, expect, judge, limits, measure, noise
from lora_edge.parity.plan.states import prompts
from lora_edge.parity.seq2seq import beginning, source, sources
from lora_edge.parity.task_reference import TaskReference
from lora_edge.runtime.seq2seq import Seq2Seq
from lora_edge.tasks.task import Task

_SOURCES = (11, 40, 3, 24)
_TARGETS = (7, 1, 33, 12)
_LONGER = 150  # past the 128 tokens that T5's relative positions tell apart
_NOISE = 1 << 30


def check_seq2seq(
    graph: Captured[Seq2SeqSpec],
    base: Base,
    task: Task,
    *,
    seed: int = 0,
    tolerance: Tolerance | None = None,
) -> dict[str, Any]:
    """Compare captured graphs, without adapters, with eager PyTorch in float32.

    Args:
        task: what it was captured for.
        graph, base, seed, tolerance: as :func:`~lora_edge.parity.base.decoder.check_decoder`.

    Returns:
        JSON-ready figures: floor, limit and each case's errors.

    Raises:
        CaptureError: a case is beyond its limit, or proves nothing; names the case.
    """
    tolerance = tolerance or Tolerance()
    spec = graph.spec
    if spec.features:
        rows = prompts(_NOISE, (1,) * (len(_SOURCES) + 1), seed=seed, longest=1)
    else:
        longest = spec.max_source or _LONGER
        rows = prompts(spec.vocab_size, (*_SOURCES, _LONGER), seed=seed, longest=longest)
    longest = spec.max_target or _LONGER
    tails = prompts(spec.vocab_size, (*_TARGETS, _LONGER), seed=seed + 1, longest=longest - 1)
    targets = [beginning(spec, row)[:1] + tail for row, tail in zip(rows, tails, strict=True)]
    targets[1] = targets[1][:1]
    reference = TaskReference(base, task)
    inputs = [
        {**source(spec, row), "decoder_input_ids": np.array(target, np.int64)}
        for row, target in zip(rows, targets, strict=True)
    ]
    expected = [output.astype(np.float32) for output in reference.outputs(inputs)]
    with reference.wide():
        floor = noise(expected, reference.outputs(inputs))
    del reference
    session = Seq2Seq(graph.path.parent, spec)
    count = len(_SOURCES)
    cases: dict[str, dict[str, float]] = {}
    for name, part in {
        "rows of unequal lengths": slice(0, count),
        "one row": slice(0, 1),
        "the start token alone": slice(1, 2),
        "one longer row": slice(count, count + 1),
        "all rows": slice(0, count + 1),
    }.items():
        actual = session.logits(sources(spec, rows[part]), targets[part])
        figures = measure([expect(row) for row in expected[part]], actual, floor, tolerance)
        limit = limits(figures, floor, tolerance, has_effect=False)
        verdict = judge(name, figures, limit, tolerance, has_effect=False)
        if verdict.status != "passed":
            raise CaptureError(
                f"the captured graphs of {base.name_or_path} differ from PyTorch: {verdict.reason}",
                "Report the model; this capture is not used.",
            )
        cases[name] = {"logit_error": figures.logit_error, "relative_error": figures.effect_error}
    return {"cases": cases, "floor": floor.logit, "limit": tolerance.multiple * floor.logit}
