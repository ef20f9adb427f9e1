"""A metric on the user's own examples, under PyTorch and under the bundle, example by example.

Two averages that agree prove little: what one side gains here it may lose there. So the examples
are paired, and a sign test says whether one side does better; and the same test must show that the
adapter itself moves the metric, or the metric proves nothing about it. Knows the reference and
runtimes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lora_edge.bundle.bundle import Bundle
from lora_edge.errors import DataError
from lora_edge.names import NONE_ADAPTER
from lora_edge.parity.case import Case, TaskFigures
from lora_edge.parity.compare import Floor, Status, Tolerance
from lora_edge.parity.evaluate.metrics import Metric, Scores, check_metric, choose, right_labels
from lora_edge.parity.plan.examples import Example
from lora_edge.parity.reference import Reference
from lora_edge.runtime import Runner

_SIGNIFICANT = 0.05


def evaluate(
    runner: Runner,
    reference: Reference,
    examples: Sequence[Example],
    metric: str | None,
    floors: Mapping[str, Floor],
    tolerance: Tolerance,
    progress: Callable[[str], None],
) -> list[Case]:
    """Compare the metric of each adapter.

    Args:
        runner: of the bundle.
        reference: its model in PyTorch, with the adapters.
        examples: the user's own.
        metric: ``exact_match`` or ``perplexity`` of a bundle that generates text, ``accuracy`` of
            one that labels texts; ``None``: the first that the task has.
        floors: label of a state -> the reference's noise in it.
        tolerance: how many floors two log probabilities may differ by and still be equal.
        progress: called with a line for each adapter.

    Returns:
        A case for each adapter that has examples.

    Raises:
        DataError: the bundle's task has no such metric, or no example is for one of its adapters.
    """
    check_examples(runner.bundle, examples, metric)
    measure = choose(runner, reference, metric)
    cases = []
    for name in runner.adapters:
        own = [example for example in examples if example.adapter in {None, name}]
        if own:
            progress(f"measuring {measure.metric} of {name} on {len(own)} examples")
            cases.append(_case(measure, name, own, floors[name], tolerance))
    return cases


def check_examples(bundle: Bundle, examples: Sequence[Example], metric: str | None) -> None:
    """Find mistakes before hours are spent.

    Raises:
        DataError: as :func:`evaluate`, or a label that an adapter's head does not have.
    """
    adapters = sorted(set(bundle.manifest.adapters) - {NONE_ADAPTER})
    names = {example.adapter for example in examples} - {None, *adapters}
    if names:
        raise DataError(
            f"an example is for the adapter {sorted(map(str, names))[0]!r}, which the bundle does "
            "not have",
            f"Its adapters are {', '.join(adapters)}.",
        )
    if check_metric(bundle, metric) == "accuracy":
        for name in adapters:
            own = [example for example in examples if example.adapter in {None, name}]
            right_labels(bundle, name, own)


def _case(
    measure: Metric, name: str, examples: Sequence[Example], floor: Floor, tolerance: Tolerance
) -> Case:
    ours, theirs, without = measure.scores(name, examples)
    noise = measure.noise(examples, 2 * tolerance.multiple * floor.logit)
    better, worse, p = sign_test(ours - theirs, noise)
    _, _, moved = sign_test(theirs - without, noise)
    figures = TaskFigures(
        measure.metric,
        len(examples),
        measure.average(theirs, examples),
        measure.average(ours, examples),
        measure.average(without, examples),
        better,
        worse,
        p,
    )
    who = f"adapter {name}, {measure.metric}"
    status: Status = "passed"
    reason = ""
    if not np.isfinite(ours).all() or p < _SIGNIFICANT:
        status = "failed"
        reason = (
            f"{who}: {figures.bundle:.4g} under the bundle, {figures.reference:.4g} under PyTorch: "
            f"worse on {worse} and better on {better} of {len(examples)} examples (p = {p:.1e})"
        )
    elif moved >= _SIGNIFICANT:
        status = "unproved"
        reason = (
            f"{who}: it does not show what the adapter does: {figures.base:.4g} without it, "
            f"{figures.reference:.4g} with it, on {len(examples)} examples (p = {moved:.1e})"
        )
    return Case(who, (name,), status, reason, kind="task", task=figures)


def sign_test(differences: Scores, noise: Scores) -> tuple[int, int, float]:
    """Whether one of two sides is better more often than chance would have it.

    Args:
        differences: ``[examples]``.
        noise: ``[examples]``, differences up to it are ties, which say nothing.

    Returns:
        How often it is better, how often worse, and the two-sided probability of so unequal a
        split where better and worse are equally likely.
    """
    better = int((differences > noise).sum())
    worse = int((differences < -noise).sum())
    count, fewer = better + worse, min(better, worse)
    tail = sum(math.comb(count, k) for k in range(fewer + 1))
    return better, worse, min(1.0, 2 * tail / 2**count)
