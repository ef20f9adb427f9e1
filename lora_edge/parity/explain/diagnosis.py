"""What kind of wrong a failing comparison is, in one short clause. Pure numpy.

A clause says what was measured and no more. First come the outputs themselves (NaN, the base's
own), then what the bundle gives when it is asked in another way, through a
:class:`~lora_edge.parity.explain.failure.Bench`: without an adapter, each row alone, without the
cache;
then *lookalikes* (what else has these outputs) and *remedies* (changes of the adapter's tensors
that make it right). Where none fits, the clause says where it begins, or how much of the effect
there is. Knows nothing of bundles and runtimes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from lora_edge.maths.lora import WideArray
from lora_edge.parity.compare import Expected
from lora_edge.parity.explain.failure import (
    Bench,
    Failure,
    Outputs,
    Run,
    Scaled,
    errors_of,
    kept,
    largest,
    of_base,
    within,
)

_STEPS, _HOPE, _STRIDE = 10, 3, 0.7  # of the search for a factor
_LEAK = 1e-4  # a smaller share of another row's adapter is not told from rounding
_ROUNDING = 0.02  # an error up to this share of the effect may be rounding
_PROPORTIONAL = 0.98  # cosine with the effect from which it is a multiple of it
_LATE = 25  # a position that no short prompt of the plan has
_UNLIKE = 0.3  # cosine with the effect below which it is another one


def diagnose(failure: Failure, bench: Bench) -> str:
    """One clause on what kind of wrong it is, to stand behind the figures."""
    if failure.of_mixed and (alone := bench.alone()) is not None:
        pairs = zip(alone, failure.actual, strict=True)
        if all(within([np.abs(x - own).max(-1)], failure.limit) for x, own in pairs):
            return "alone the row gives the same: see the case of its adapter, not the batch"
    if failure.has_effect and (found := _of_the_base(failure, bench)):
        return found
    where = _finite(failure, bench) or _placed(failure, bench)
    if not failure.has_effect:
        return _joined("the base itself is wrong", where or _began(failure))
    if where:
        return where
    if within(errors_of([of_base(row) for row in failure.expected], failure.actual), failure.limit):
        return _joined("the adapter does nothing: the outputs are the base's", bench.findings())
    found = _alike(failure, bench) or _remedied(failure, bench) or _rescaled(failure, bench)
    if found:
        return found
    return _joined(_marked(failure) or _began(failure), _share(failure), bench.findings())


def _of_the_base(failure: Failure, bench: Bench) -> str:
    """It is wrong without an adapter too."""
    off = bench.off()
    if off is None:
        return ""
    outputs, without = off
    base = [of_base(row) for row in failure.expected]
    errors = errors_of(base, outputs)
    if within(errors, failure.limit):
        return ""
    own = replace(failure, expected=base, actual=outputs, marks=())
    where = _finite(own, without) or _placed(own, without) or _began(own)
    if failure.headed:
        said = where or "the task head or the base is wrong"
        return _joined(f"{largest(errors)} with its low-rank part off: {said}", bench.findings())
    return _joined(
        f"the base itself is wrong ({largest(errors)} without any adapter), which says nothing of "
        "the adapter",
        where,
    )


def _joined(*clauses: str) -> str:
    return "; ".join(clause for clause in clauses if clause)


# What the outputs show by themselves.


def _finite(failure: Failure, bench: Bench) -> str:
    for index, logits in enumerate(failure.actual):
        bad = np.flatnonzero(~np.isfinite(logits).all(-1))
        if bad.size:
            alone = bench.alone()
            if alone is not None and within(errors_of(failure.expected, alone), failure.limit):
                return (
                    "NaN or Inf in the batch only, each row alone is right: 0 x Inf of another row"
                )
            found = f"NaN or Inf from position {bad[0]} of row {index} on"
            return _joined(found, bench.findings())
    return ""


def _began(failure: Failure) -> str:
    """Where the rows go wrong, if that is the same for all of them."""
    for step, other in ((-1, "before"), (1, "after")):
        if _moved(failure, step):
            return f"each position of the prompts has the outputs of the one {other} it"
    first = [place for place in failure.first_wrong() if place is not None]
    if not failure.causal:
        return ""
    if len(failure.rows) == 1 and first and first[0] >= _LATE:
        return _late(failure, first[0])
    if len(first) < 2 or len(set(first)) > 1 or first[0] == 0:
        return ""
    if first[0] == 1:
        return (
            "right at each row's first token and wrong from the second on, as where attention is "
            "wrong (q, k, positions or mask)"
        )
    return f"right before position {first[0]} in every row: a window, or a limit of positions"


def _late(failure: Failure, place: int) -> str:
    """Of one long row: it is right up to some position, which may lie between two that are kept."""
    places = failure.expected[0].places
    known = place if places is None else int(places[places < place].max(initial=-1)) + 1
    where = f"{place}" if known == place else f"{place}, and right up to {known - 1}"
    return f"wrong from position {where}: a window, a limit of positions, or a table of them"


def _moved(failure: Failure, step: int) -> bool:
    """The outputs of the prompts are the reference's of the neighbouring positions."""
    pairs = zip(failure.expected, failure.actual, failure.prompts, strict=True)
    rows = [
        (row, logits, count) for row, logits, count in pairs if count > 2 and row.places is None
    ]
    moved = []
    for row, logits, count in rows:
        there = row.first(count)
        shifted = np.roll(logits[:count], step, axis=0)
        inner = slice(None, -1) if step < 0 else slice(1, None)
        moved.append(np.abs(kept(there, shifted) - there.reference).max(-1)[inner])
    return bool(rows) and within(moved, failure.limit)


def _marked(failure: Failure) -> str:
    """Where the rows go wrong, against the tokens that the adapter waits for."""
    first = failure.first_wrong()
    marks = [failure.first_mark(index) for index in range(len(first))]
    pairs = list(zip(first, marks, strict=True))
    if not failure.marks or all(place is None for place in first):
        return ""
    if any(mark is None and place is not None for place, mark in pairs):
        return "also where its invocation is not" if failure.invoked else ""
    late = {place - mark for place, mark in pairs if place is not None and mark is not None}
    if not failure.invoked:
        return "right until a token that it trains appears, wrong from there" if late == {0} else ""
    if len(late) > 1:
        return ""
    (off,) = late
    if off < 0:
        return f"wrong from {-off} token(s) before its invocation on: active too early"
    still = min(failure.like_base(index, place) for index, (place, _) in enumerate(pairs) if place)
    if off == 0 and still:
        return f"from its invocation on the base's outputs for {still} token(s): active too late"
    return "right before its invocation, wrong from it on" if off == 0 else ""


def _share(failure: Failure) -> str:
    """How much of the effect there is, and whether in proportion."""
    dot = effect = size = 0.0
    for row, logits in zip(failure.expected, failure.actual, strict=True):
        if row.base is not None:
            change = row.reference.astype(np.float64) - row.base
            own = kept(row, logits).astype(np.float64) - row.base
            dot += float(np.sum(own * change))
            effect += float(np.sum(change * change))
            size += float(np.sum(own * own))
    if effect <= 0 or size <= 0:
        return ""
    gain, cosine = dot / effect, dot / math.sqrt(effect * size)
    rest = math.sqrt(max(0.0, size / effect - gain * gain))
    error = math.sqrt(max(0.0, size / effect - 2 * gain + 1))
    if error <= _ROUNDING:
        return (
            f"the effect is there but for {100 * error:.2g} % of it: rounding (half precision, "
            "quantization), or a small part of the adapter"
        )
    if abs(cosine) >= _PROPORTIONAL and abs(gain - 1) > rest:
        if gain < 0:
            return f"the effect is {gain:.2f} times what it should be: its sign is reversed"
        return (
            f"the effect is {gain:.2f} times what it should be (cosine {cosine:.3f}): check alpha, "
            "rank or rsLoRA, or whether it was merged twice"
        )
    if cosine < -_UNLIKE:
        return f"the effect points the other way (cosine {cosine:.2f})"
    if cosine < _UNLIKE:
        return (
            f"the effect is another one (cosine {cosine:.2f}, {math.sqrt(size / effect):.2g} times "
            "the size)"
        )
    return f"part of the effect is missing or wrong (cosine {cosine:.2f})"


# What the bundle gives when it is asked in another way.


def _placed(failure: Failure, bench: Bench) -> str:
    """It is wrong in company, or behind the cache, only."""
    first = failure.first_wrong()
    pairs = list(zip(first, failure.prompts, strict=True))
    alone = bench.alone()
    apart = alone is not None and within(errors_of(failure.expected, alone), failure.limit)
    if apart:
        alike = bench.alike()
        if alike is not None and within(errors_of(failure.expected, alike), failure.limit):
            return _mixed_up(failure, bench)
        if found := _rested(failure, bench) or _crowded(failure, bench):
            return found
        if all(place is None or short for place, short in zip(first, failure.padded, strict=True)):
            return "only rows that are padded are wrong, and alone they are right: padding or mask"
    if all(place is None or place >= prompt for place, prompt in pairs) and any(first):
        at_once = bench.at_once()
        if at_once is not None and within(errors_of(failure.expected, at_once), failure.limit):
            return (
                "the prompt is right and the decode steps are wrong, but right when all tokens "
                "are run at once: the KV cache, or the positions of decode steps"
            )
    return "each row alone is right: the rows of a batch are not kept apart" if apart else ""


def _rested(failure: Failure, bench: Bench) -> str:
    """It is wrong where rows rest, only."""
    awake = bench.awake() if failure.rested else None
    if awake is None or not within(errors_of(failure.expected, awake), failure.limit):
        return ""
    same = [own[: len(x)] for own, x in zip(failure.actual, awake, strict=True)]
    if within(errors_of(failure.expected, same), failure.limit):
        return ""  # what is wrong comes later
    return (
        "right where no row of the batch rests, wrong where some do (rows that have ended, or "
        "wait): their cache, or that of their neighbours"
    )


def _crowded(failure: Failure, bench: Bench) -> str:
    """It is wrong in batches from some size on: copies of a row alone need no padding."""
    wrong = [index for index, place in enumerate(failure.first_wrong()) if place is not None]
    if not wrong:
        return ""
    index = wrong[0]

    def right(count: int) -> bool:
        copies = bench.copies(index, count)
        return within(errors_of([failure.expected[index]] * count, copies), failure.limit)

    if right(bench.batch):
        return ""
    most, wrong_from = 1, bench.batch
    while wrong_from - most > 1:
        count = (most + wrong_from) // 2
        most, wrong_from = (count, wrong_from) if right(count) else (most, count)
    return (
        f"a row alone is right, and so are {most} copies of it, but not {wrong_from}: batches of "
        f"more than {most} row{'s' if most > 1 else ''}, not padding"
    )


def _mixed_up(failure: Failure, bench: Bench) -> str:
    what = "alone, and with its adapter on all rows, the row is right; in the mixed batch "
    if found := _alike(failure, bench):
        return f"{what}{found}"
    target = [logits[:count] for logits, count in zip(failure.actual, failure.prompts, strict=True)]
    for name, run in bench.leaks():
        share = _solve(_leaked(run, target), [0.1], failure.limit)
        if abs(share) > _LEAK:
            return f"{what}{share:.2g} times {name}, of another row, leaks into it"
    return f"{what}it is wrong: the rows are not kept apart"


def _alike(failure: Failure, bench: Bench) -> str:
    def same(indices: Sequence[int], found: Outputs) -> bool:
        pairs = [(failure.actual[i][: len(x)], x) for i, x in zip(indices, found, strict=True)]
        return all(
            own.shape == x.shape and bool((np.abs(own - x) <= failure.limit).all())
            for own, x in pairs
        )

    return _first_that(failure, bench.lookalikes(), same)


def _remedied(failure: Failure, bench: Bench) -> str:
    def right(indices: Sequence[int], found: Outputs) -> bool:
        if any(
            x.shape[-1] != failure.actual[i].shape[-1] for i, x in zip(indices, found, strict=True)
        ):
            return False  # another task head
        return within(errors_of([failure.expected[i] for i in indices], found), failure.limit)

    return _first_that(failure, bench.remedies(), right)


def _first_that(
    failure: Failure,
    candidates: Iterator[tuple[str, Run]],
    holds: Callable[[Sequence[int], Outputs], bool],
) -> str:
    """The first clause that holds on the shortest wrong row, and then on every row."""
    wrong = failure.wrong_prompts()
    if not wrong:
        return ""
    for clause, run in candidates:
        if all(holds(rows, run(rows)) for rows in (wrong[:1], range(len(failure.rows)))):
            return clause
    return ""


def _rescaled(failure: Failure, bench: Bench) -> str:
    wrong = failure.wrong_prompts()
    if not wrong:
        return ""
    every = range(len(failure.rows))
    for name, rank, run in bench.scaled():
        root = math.sqrt(rank)
        starts = [0.5, 2.0, -1.0, 1 / root, root, 1 / rank, float(rank)]
        factor = _solve(_unscaled(run, wrong[0], failure.expected[wrong[0]]), starts, failure.limit)
        if not factor:
            continue
        if not within(errors_of(failure.expected, run(every, factor)), failure.limit):
            continue
        if abs(factor + 1) < 1e-3:
            return f"{name} has its sign reversed (with its B negated it is right)"
        return (
            f"{name} is scaled by {1 / factor:.3g}{_rooted(1 / factor, rank)} (with its B times "
            f"{factor:.3g} it is right): check alpha, rank or rsLoRA"
        )
    return ""


def _rooted(scale: float, rank: int) -> str:
    """The scale, if rsLoRA would explain it."""
    root = math.sqrt(rank)
    if rank > 1 and math.isclose(scale, root, rel_tol=1e-3):
        return f", the root of its rank {rank},"
    if rank > 1 and math.isclose(scale, 1 / root, rel_tol=1e-3):
        return f", 1 / the root of its rank {rank},"
    return ""


def _unscaled(run: Scaled, index: int, expected: Expected) -> Callable[[float], WideArray]:
    def miss(factor: float) -> WideArray:
        (found,) = run([index], factor)
        return _missing([kept(expected, found)], [expected.first(len(found)).reference])

    return miss


def _leaked(run: Scaled, target: Outputs) -> Callable[[float], WideArray]:
    return lambda share: _missing(run(range(len(target)), share), target)


def _solve(miss: Callable[[float], WideArray], starts: Sequence[float], limit: float) -> float:
    """The factor at which nothing is missing, by Gauss and Newton; 0 where none is found."""
    misses = [miss(start) for start in starts]
    sizes = [float(np.abs(x).max()) for x in misses]
    best = int(np.argmin(sizes))
    factor, here, size = starts[best], misses[best], sizes[best]
    for step in range(_STEPS):
        if step == _HOPE and size > 0.2 * sizes[best]:
            break  # no factor comes near
        slope = (miss(factor * 1.001) - here) / (factor * 0.001)
        steep = float(slope @ slope)
        if not math.isfinite(size) or not math.isfinite(steep) or steep == 0:
            return 0.0
        bound = _STRIDE * abs(factor)
        closer = factor - min(max(float(slope @ here) / steep, -bound), bound)
        there = miss(closer)
        new = float(np.abs(there).max())
        if size <= limit and not new < size:  # as good as rounding lets it be
            break
        factor, here, size = closer, there, new
    return factor if size <= limit else 0.0


def _missing(outputs: Outputs, wanted: Outputs) -> WideArray:
    pairs = zip(outputs, wanted, strict=True)
    return np.concatenate([(x.astype(np.float64) - y).ravel() for x, y in pairs])
