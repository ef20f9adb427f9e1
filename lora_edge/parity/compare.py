"""Expected against actual logits: figures, limits, verdict. Pure numpy.

Closeness alone proves nothing, because an adapter that does nothing passes it; so everything is
also measured against the *effect*, what the adapter changes in the reference:

* ``logit_error   = max |y - y_ref|``
* ``effect_error  = ||y - y_ref|| / ||y_ref - y_base||``

A limit is a stated multiple of a measured noise floor: how far PyTorch in float32 is from PyTorch
in float64 on the same inputs. Knows nothing of bundles, runtimes or PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lora_edge.errors import BundleError
from lora_edge.files.spilled import by_rows

Status = Literal["passed", "failed", "unproved"]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Floor:
    """The reference's own rounding noise.

    Attributes:
        logit: largest absolute difference of a logit.
        rms: root mean square difference over all logits.
    """

    logit: float
    rms: float

    def joined(self, other: Floor | None) -> Floor:
        """The larger of each, of two measurements of one state."""
        if other is None:
            return self
        return Floor(max(self.logit, other.logit), max(self.rms, other.rms))


@dataclass(frozen=True)
class Tolerance:
    """How limits follow from the floor.

    Attributes:
        multiple: limit = multiple x floor. ONNX Runtime rounds in another order than PyTorch, so
            its error is of the floor's size but not the floor; 10 leaves room for its worst logit.
        sensitivity: largest relative error that a proof may be blind to. A limit above it, relative
            to the effect, makes a case unproved.
    """

    multiple: float = 10.0
    sensitivity: float = 0.01


@dataclass(frozen=True)
class Expected:
    """The reference's outputs of one row at P of its positions.

    Attributes:
        columns: ``[P, C] int64``, the token ids that are kept; ``None``: the whole vocabulary.
        reference: ``[P, C] float32``, the logits.
        base: ``[P, C] float32``, the logits without an adapter; ``None`` where none is active.
        log_total: ``[P] float64``, logsumexp of the reference over the whole vocabulary.
        top1: ``[P] int64``, the best token.
        margin: ``[P] float32``, how far the best logit is above the second.
        places: ``[P] int64``, the row's positions that are kept, ascending, the last one always
            among them; ``None``: all.
    """

    columns: NDArray[np.int64] | None
    reference: FloatArray
    base: FloatArray | None
    log_total: NDArray[np.float64]
    top1: NDArray[np.int64]
    margin: FloatArray
    places: NDArray[np.int64] | None = None

    @property
    def length(self) -> int:
        """Number of positions of the row, kept or not."""
        return len(self.top1) if self.places is None else int(self.places[-1]) + 1

    def first(self, count: int) -> Expected:
        """What is kept of the first ``count`` positions."""
        kept = count if self.places is None else int(np.searchsorted(self.places, count))
        return self.at(slice(kept))

    def at(self, chosen: slice | NDArray[np.int64]) -> Expected:
        """Some of what is kept."""
        return Expected(
            None if self.columns is None else self.columns[chosen],
            self.reference[chosen],
            None if self.base is None else self.base[chosen],
            self.log_total[chosen],
            self.top1[chosen],
            self.margin[chosen],
            None if self.places is None else self.places[chosen],
        )

    def of(self, logits: FloatArray) -> FloatArray:
        """The rows of a row's whole logits ``[length, vocab]`` that belong to what is kept."""
        return logits if self.places is None else logits[self.places]


@dataclass(frozen=True)
class Figures:
    """What was measured over one or several rows.

    Attributes:
        positions: number of compared positions.
        logit_error: max |y - y_ref|.
        effect_error: error relative to the effect; without an adapter, relative to ``spread``.
        effect_max: max |y_ref - y_base|; 0 without an adapter.
        effect_rms: root mean square of the same; 0 without an adapter.
        spread: root mean square of the reference's logits about their mean at each position.
        gain: share of the reference's effect that is there (1: all); ``nan`` without an adapter.
        top1: share of positions whose best token is the reference's.
        token_differences: positions with another best token though the margin exceeds the limit.
        token_ties: positions with another best token where the margin does not.
        kl: mean KL divergence of the actual from the reference's distribution, in nats; a lower
            bound where columns are kept.
        error_spread: standard deviation, from position to position, of ``effect_error`` taken at a
            position alone: what the figure varies by where nothing is wrong.
    """

    positions: int
    logit_error: float
    effect_error: float
    effect_max: float
    effect_rms: float
    spread: float
    gain: float
    top1: float
    token_differences: int
    token_ties: int
    kl: float
    error_spread: float = 0.0


@dataclass(frozen=True)
class Limits:
    """The floors and limits that one comparison is judged by.

    Attributes:
        logit_floor: the floor of ``logit_error``.
        logit: its limit.
        effect_floor: the floor of ``effect_error``; ``inf`` where there is no effect.
        effect: its limit.
    """

    logit_floor: float
    logit: float
    effect_floor: float
    effect: float


@dataclass(frozen=True)
class Verdict:
    """The outcome of one comparison, with its one-line reason (empty when passed)."""

    status: Status
    reason: str = ""


def expect(reference: FloatArray, base: FloatArray | None = None) -> Expected:
    """The expectation that follows from whole logits.

    Args:
        reference: ``[P, vocab]``.
        base: ``[P, vocab]`` without the adapter, or ``None`` where no adapter is active.
    """
    top = np.empty(len(reference), np.int64)
    margin = np.full(len(reference), np.inf, np.float32)
    for part in by_rows(reference):
        top[part] = np.argmax(reference[part], axis=-1)
        if reference.shape[1] > 1:
            best_two = np.partition(reference[part], -2, axis=-1)[:, -2:]
            margin[part] = best_two.max(-1) - best_two.min(-1)
    return Expected(None, reference, base, log_total(reference), top, margin)


def log_total(logits: FloatArray) -> NDArray[np.float64]:
    """logsumexp over the last axis in float64, block by block."""
    total = np.empty(logits.shape[0], np.float64)
    for part in by_rows(logits):
        wide = logits[part].astype(np.float64)
        peak = wide.max(-1, keepdims=True)
        total[part] = peak[:, 0] + np.log(np.exp(wide - peak).sum(-1))
    return total


def noise(narrow: Sequence[FloatArray], wide: Sequence[NDArray[np.floating]]) -> Floor:
    """The floor from the same rows at two precisions, ``[len, vocab]`` each.

    Never below one unit in the last place of the largest logit: agreement by luck is no floor.
    """
    unit = float(np.finfo(np.float32).eps)
    worst = largest = error = size = 0.0
    for row, exact in zip(narrow, wide, strict=True):
        for part in by_rows(row, exact):
            own = row[part].astype(np.float64)
            off = np.abs(own - exact[part])
            # max would drop a NaN; a NaN must reach the verdict
            worst = float(np.maximum(worst, off.max()))
            largest = float(np.maximum(largest, np.abs(own).max()))
            error += float(np.sum(off * off))
            size += float(np.sum(own * own))
    count = sum(row.size for row in narrow)
    return Floor(
        float(np.maximum(worst, unit * largest)),
        float(np.maximum(math.sqrt(error / count), unit * math.sqrt(size / count))),
    )


def measure(
    expected: Sequence[Expected],
    actual: Sequence[FloatArray],
    floor: Floor,
    tolerance: Tolerance,
) -> Figures:
    """Compare rows.

    Args:
        expected: one per row.
        actual: ``[length, vocab] float32`` per row, every position and the whole vocabulary.
        floor: the reference's noise.
        tolerance: how the limit of the tokens' margin follows from it.
    """
    error = effect = spread = dot = kl = 0.0
    logit_error = effect_max = 0.0
    count = positions = agree = differences = ties = 0
    margin_limit = tolerance.multiple * floor.logit
    at_positions: list[NDArray[np.float64]] = []
    for row, whole_row in zip(expected, actual, strict=True):
        logits = row.of(whole_row)
        positions += len(row.top1)
        for part in by_rows(logits, row.reference, row.base):
            same = np.argmax(logits[part], axis=-1) == row.top1[part]
            beyond = ~same & (row.margin[part] > margin_limit)
            agree += int(same.sum())
            differences += int(beyond.sum())
            ties += int((~same & ~beyond).sum())
            whole = logits[part].astype(np.float64)
            reference = row.reference[part].astype(np.float64)
            kept = whole if row.columns is None else _take(whole, row.columns[part])
            kl += _divergence(reference, row.log_total[part], kept, log_total(logits[part]))
            off = kept - reference
            # fmax would drop a NaN; a NaN must reach the verdict
            logit_error = float(np.maximum(logit_error, np.abs(off).max()))
            at_positions.append(np.sum(off * off, axis=-1))
            error += float(at_positions[-1].sum())
            spread += float(np.sum((reference - reference.mean(-1, keepdims=True)) ** 2))
            count += off.size
            if row.base is not None:
                change = reference - row.base[part]
                effect_max = max(effect_max, float(np.abs(change).max()))
                effect += float(np.sum(change * change))
                dot += float(np.sum((kept - row.base[part]) * change))
    scale = effect if any(row.base is not None for row in expected) else spread
    each = np.sqrt(np.concatenate(at_positions) * positions)
    return Figures(
        positions=positions,
        logit_error=logit_error,
        effect_error=math.sqrt(error / scale) if scale > 0 else math.inf,
        effect_max=effect_max,
        effect_rms=math.sqrt(effect / count),
        spread=math.sqrt(spread / count),
        gain=dot / effect if effect > 0 else math.nan,
        top1=agree / positions,
        token_differences=differences,
        token_ties=ties,
        kl=kl / positions,
        error_spread=float(np.std(each)) / math.sqrt(scale) if scale > 0 else math.inf,
    )


def limits(figures: Figures, floor: Floor, tolerance: Tolerance, *, has_effect: bool) -> Limits:
    """The limits for one comparison; ``has_effect``: an adapter is active in it."""
    scale = figures.effect_rms if has_effect else figures.spread
    effect_floor = floor.rms / scale if scale > 0 else math.inf
    return Limits(
        floor.logit,
        tolerance.multiple * floor.logit,
        effect_floor,
        tolerance.multiple * effect_floor,
    )


def judge(
    who: str, figures: Figures, limit: Limits, tolerance: Tolerance, *, has_effect: bool
) -> Verdict:
    """The verdict on one comparison.

    Args:
        who: names the adapter (and the row) in the reason.
        figures: what was measured.
        limit: what it is judged by.
        tolerance: holds the sensitivity that a proof needs.
        has_effect: an adapter is active, so the effect must be there.
    """
    relative = "effect-relative error" if has_effect else "error relative to the logits' spread"
    dead = has_effect and (
        figures.effect_max <= limit.logit or limit.effect_floor * tolerance.multiple >= 1
    )
    if not math.isfinite(figures.logit_error):
        return Verdict("failed", f"{who}: the outputs are NaN or Inf")
    if not figures.logit_error <= limit.logit:
        reason = _off("logit error", figures.logit_error, limit.logit, limit.logit_floor)
        if has_effect and not dead:
            reason += f"; effect-relative error {figures.effect_error:.1e}{_gain(figures.gain)}"
        return Verdict("failed", f"{who}: {reason}")
    if dead:
        return Verdict(
            "unproved",
            f"{who}: no effect: it changes no logit by more than {figures.effect_max:.1e} "
            f"(floor {limit.logit_floor:.1e}), so nothing is proved",
        )
    if not figures.effect_error <= limit.effect:
        reason = _off(relative, figures.effect_error, limit.effect, limit.effect_floor)
        return Verdict("failed", f"{who}: {reason}{_gain(figures.gain)}")
    if figures.token_differences:
        return Verdict(
            "failed",
            f"{who}: {figures.token_differences} of {figures.positions} best tokens differ where "
            f"PyTorch's margin exceeds the limit {limit.logit:.1e}",
        )
    if limit.effect > tolerance.sensitivity:
        return Verdict(
            "unproved",
            f"{who}: the floor is not far below the effect: {relative} has floor "
            f"{limit.effect_floor:.1e} and limit {limit.effect:.1e}; a proof needs a limit of "
            f"{tolerance.sensitivity:.0e} or less",
        )
    return Verdict("passed")


def _off(what: str, value: float, limit: float, floor: float) -> str:
    return f"{what} {value:.1e} exceeds the limit {limit:.1e} (floor {floor:.1e})"


def _gain(gain: float) -> str:
    if math.isnan(gain):
        return ""
    return f"; it has {gain:.2f} times PyTorch's effect"


def _take(logits: NDArray[np.float64], columns: NDArray[np.int64]) -> NDArray[np.float64]:
    if columns.size and int(columns.max()) >= logits.shape[-1]:
        raise BundleError(
            f"a golden case keeps column {int(columns.max())} of outputs that have "
            f"{logits.shape[-1]}",
            "The case is of another bundle; copy the bundle again, or export it again.",
        )
    return np.take_along_axis(logits, columns, axis=-1)


def _divergence(
    reference: NDArray[np.float64],
    reference_total: NDArray[np.float64],
    actual: NDArray[np.float64],
    actual_total: NDArray[np.float64],
) -> float:
    """Sum over positions of KL(reference || actual); what is not kept is one bucket."""
    log_p = reference - reference_total[:, None]
    log_q = actual - actual_total[:, None]
    p, q = np.exp(log_p), np.exp(log_q)
    inside = np.sum(p * (log_p - log_q), axis=-1)
    rest_p, rest_q = 1 - p.sum(-1), 1 - q.sum(-1)
    some = (rest_p > 1e-9) & (rest_q > 1e-9)
    safe_p, safe_q = np.where(some, rest_p, 1.0), np.where(some, rest_q, 1.0)
    rest = np.where(some, safe_p * (np.log(safe_p) - np.log(safe_q)), 0.0)
    return float(np.sum(np.maximum(inside + rest, 0.0)))
