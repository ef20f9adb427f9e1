"""Quantization drift: what int8 activations or float16 add to a bundle that was proved without.

A bundle of few bits or of fp16 has two graphs on the same weights. One computes in float32; it is
compared with PyTorch, and that is the adapters' exactness. The other is the one that ships, and
rounds its activations to int8, or computes in float16. Here the second is compared with the first.
Knows nothing of PyTorch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lora_edge.bundle.manifest import Manifest
from lora_edge.maths.half import LARGEST_HALF
from lora_edge.maths.lora import FloatArray
from lora_edge.parity.case import Case, DriftFigures
from lora_edge.parity.compare import Expected, Floor, Tolerance, expect, log_total, measure
from lora_edge.parity.plan.states import Probe, Row, State
from lora_edge.parity.ranges import Largest
from lora_edge.parity.record.golden import Golden
from lora_edge.parity.subjects import subject_of
from lora_edge.runtime import Runner

_NO_NOISE = Floor(0.0, 0.0)
_FEW = 32  # positions
_INT8 = (
    "int8 activations",
    ("--activations fp32 exports it without int8 activations, --exact runs it without"),
)
_HALF = "float16", "--precision fp32 exports it in float32, --exact runs it so"


@dataclass(frozen=True)
class DriftLimits:
    """What int8 activations may add; what float16 may, :data:`HALF_LIMITS`.

    Attributes:
        kl: mean KL divergence from the graph in floats, in nats, over tokens or labels. Three times
            what SmolLM2-135M in int4 was measured to have.
        retained: least share of an adapter's effect that is there, and as much too much is allowed.
        cosine: least mean cosine with the embeddings of the graph in floats.
    """

    kl: float = 0.05
    retained: float = 0.9
    cosine: float = 0.99


HALF_LIMITS = DriftLimits(kl=0.005, retained=0.98, cosine=0.999)
"""A tenth of what int8 activations may add, and far above what float16 was measured to."""


def drifts(manifest: Manifest) -> bool:
    """Whether a bundle ships a graph beside the one that is proved."""
    return any(part.exact for part in manifest.parts.values())


def measures_drift(golden: Golden) -> bool:
    """Whether a golden case is of the base or of one adapter, on short prompts."""
    return golden.probe.kind in {"base", "adapter"} and not golden.probe.part


class InFloats(NamedTuple):
    """What the graph in floats gives for a golden case.

    Attributes:
        outputs: of each row.
        plain: without what adapters add; ``None``: no row has one, or the bundle does not hold it.
    """

    outputs: Sequence[FloatArray]
    plain: Sequence[FloatArray] | None


def in_floats(exact: Runner, goldens: Sequence[Golden]) -> dict[str, InFloats]:
    """What :func:`drift` is measured from, by the name of the probe.

    Afterwards the bundle need not be open in floats: two sessions are two copies of its weights.

    Args:
        exact: the bundle, computing in floats.
        goldens: their prompts and greedy continuations are run, of those that drift is measured on.
    """
    subject = subject_of(exact.bundle.manifest)
    found: dict[str, InFloats] = {}

    def outputs(golden: Golden) -> Sequence[FloatArray]:
        probe, tails = golden.probe, golden.tails
        if probe.name not in found:
            plain = subject.off(exact, probe, tails) if any(probe.states) else None
            found[probe.name] = InFloats(subject.observe(exact, probe, tails), plain)
        return found[probe.name].outputs

    for golden in filter(measures_drift, goldens):
        for case in _measured_on(golden, goldens, outputs):
            outputs(case)
    return found


def drift(
    fast: Runner,
    exact: Mapping[str, InFloats],
    goldens: Sequence[Golden],
    limits: DriftLimits | None = None,
    largest: Mapping[str, Largest] | None = None,
    said: tuple[str, str] | None = None,
) -> Iterator[Case]:
    """One case for the base and for each adapter, alone, on the short prompts of the goldens.

    Where these have few positions, as of labels, rows of long prompts and of batches count too.

    Args:
        fast: the bundle as it ships.
        exact: of the same goldens, of :func:`in_floats`.
        goldens: their prompts and greedy continuations are run.
        limits: what is allowed; ``None``: what the bundle's precision may.
        largest: name of a probe -> largest number of its values, where float16 is to hold them.
        said: what adds it, and what does without, in words; ``None``: those of the precision.
    """
    half = fast.bundle.manifest.half
    limits = limits or (HALF_LIMITS if half else DriftLimits())
    embeds = fast.bundle.manifest.gives.output != "logits"
    for golden in filter(measures_drift, goldens):
        probe = golden.probe
        chosen = _measured_on(golden, goldens, lambda x: exact[x.probe.name].outputs)
        runs = (_rows(fast, exact[each.probe.name], each, probe.states[0]) for each in chosen)
        rows = [row for own in runs for row in own]
        found = (largest or {}).get(probe.name, Largest(math.nan, ""))
        figures = dataclasses.replace(_figures(rows, limits, embeds=embeds), largest=found.number)
        yield _case(probe, figures, limits, found, *(said or (_HALF if half else _INT8)))


def _measured_on(
    golden: Golden,
    goldens: Sequence[Golden],
    outputs: Callable[[Golden], Sequence[FloatArray]],
) -> list[Golden]:
    """The case, and where it has few positions, the others in which its state is."""
    state = golden.probe.states[0]
    pairs = zip(outputs(golden), golden.probe.states, strict=True)
    if sum(len(row) for row, own in pairs if own == state) >= _FEW:
        return [golden]
    return [golden, *(x for x in goldens if x is not golden and state in x.probe.states)]


class _Run(NamedTuple):
    """A row that both graphs have run.

    Attributes:
        row: its prompt.
        tail: what follows the prompt.
        expected: what the figures are measured from.
        wanted: the outputs in floats.
        found: the outputs as the bundle ships.
    """

    row: Row
    tail: Row
    expected: Expected
    wanted: FloatArray
    found: FloatArray


def _rows(fast: Runner, exact: InFloats, golden: Golden, state: State) -> list[_Run]:
    """The rows of a golden case that are in this state."""
    probe, tails = golden.probe, golden.tails
    wanted = exact.outputs
    found = subject_of(fast.bundle.manifest).observe(fast, probe, tails)
    if not state:
        expected = [expect(row) for row in wanted]
    elif exact.plain is not None:
        expected = [expect(*pair) for pair in zip(wanted, exact.plain, strict=True)]
    else:
        expected = [_kept(*pair) for pair in zip(golden.expected, wanted, strict=True)]
    runs = map(_Run, probe.rows, tails, expected, wanted, found)
    return [run for run, own in zip(runs, probe.states, strict=True) if own == state]


def _figures(rows: Sequence[_Run], limits: DriftLimits, *, embeds: bool) -> DriftFigures:
    found = [row.found for row in rows]
    figures = measure([row.expected for row in rows], found, _NO_NOISE, Tolerance())
    of_logits = math.nan if embeds else 1.0
    return DriftFigures(
        positions=figures.positions,
        logit_error=figures.logit_error,
        effect_error=figures.effect_error,
        retained=figures.gain,
        kl=figures.kl * of_logits,
        top1=figures.top1 * of_logits,
        perplexity=_perplexity(rows, found),
        exact_perplexity=_perplexity(rows, [row.wanted for row in rows]),
        kl_limit=limits.kl * of_logits,
        retained_limit=limits.retained,
        cosine=_cosine(rows) if embeds else math.nan,
        cosine_limit=limits.cosine if embeds else math.nan,
    )


def _kept(golden: Expected, logits: FloatArray) -> Expected:
    """The logits of a bundle's graph in floats, at what a golden case keeps of them.

    What they are without the adapter's effect is the golden case's, which has PyTorch's: a merged
    bundle does not hold it, and of an adapter with a head it is that head on the base.
    """
    own = golden.of(logits)
    kept = own if golden.columns is None else np.take_along_axis(own, golden.columns, -1)
    return dataclasses.replace(
        golden, reference=kept, log_total=log_total(own), top1=np.argmax(own, axis=-1)
    )


def _cosine(rows: Sequence[_Run]) -> float:
    """Mean over the positions of all rows."""
    each: list[float] = []
    for row in rows:
        a, b = row.wanted.astype(np.float64), row.found.astype(np.float64)
        sizes = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        each += ((a * b).sum(-1) / np.maximum(sizes, np.finfo(np.float64).tiny)).tolist()
    return sum(each) / len(each)


def _perplexity(rows: Sequence[_Run], outputs: Sequence[FloatArray]) -> float:
    """Of the continuations, which are the model's own greedy text; ``nan`` where there are none."""
    total, count = 0.0, 0
    for run, logits in zip(rows, outputs, strict=True):
        before = logits[-1 - len(run.tail) : -1]
        own = before[np.arange(len(run.tail)), list(run.tail)].astype(np.float64)
        total += float(np.sum(log_total(before) - own))
        count += len(run.tail)
    return math.exp(total / count) if count else math.nan


def _case(
    probe: Probe,
    figures: DriftFigures,
    limits: DriftLimits,
    largest: Largest,
    what: str,
    way_out: str,
) -> Case:
    who = f"adapter {probe.adapters[0]}" if probe.adapters else "the base"
    name = f"drift, {probe.name}"
    said = ""
    if largest.number > LARGEST_HALF:
        said = (
            f"{largest.where} overflows: its largest number is {largest.number:.6g}, and float16 "
            f"has none above {LARGEST_HALF:.0f}"
        )
    elif not math.isnan(figures.cosine_limit):
        if not figures.cosine >= limits.cosine:
            said = (
                f"the cosine of its embeddings is {figures.cosine:.4f}, and {limits.cosine:.2f} "
                "is the least that is allowed"
            )
    elif not figures.kl <= limits.kl:
        said = f"its KL divergence is {figures.kl:.2g} nats, and {limits.kl:.2g} is allowed"
    if not said and probe.adapters and not abs(1 - figures.retained) <= 1 - limits.retained:
        said = (
            f"{figures.retained:.0%} of its effect is there, and {limits.retained:.0%} to "
            f"{2 - limits.retained:.0%} is allowed"
        )
    if not said:
        return Case(name, probe.adapters, "passed", kind="drift", drift=figures)
    reason = (
        f"{who}: quantization drift, which is no fault of an adapter: with {what} {said} "
        f"({way_out})"
    )
    return Case(name, probe.adapters, "failed", reason, kind="drift", drift=figures)
