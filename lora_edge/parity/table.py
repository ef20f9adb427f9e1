"""Cases as a table for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lora_edge.parity.case import Case

_DRIFT_HEADER = (
    "case", "effect error", "effect", "KL", "limit", "top-1", "cosine", "limit", "perplexity",
    "in floats", "",
)  # fmt: skip
_HEADER = ("case", "logit error", "limit", "effect error", "limit", "effect", "top-1", "KL", "")


def table(title: str, cases: Iterable[Case]) -> str:
    """Cases that are judged by their errors."""
    return _lines(title, [_HEADER, *map(_cells, cases)])


def drift_table(title: str, cases: Iterable[Case]) -> str:
    """Cases of drift."""
    return _lines(title, [_DRIFT_HEADER, *map(_drift_cells, cases)])


def _cells(case: Case) -> tuple[str, ...]:
    figures, limits = case.figures, case.limits
    verdict = case.status if case.status == "passed" else case.status.upper()
    if figures is None or limits is None:
        return (case.name, *[""] * 7, verdict)
    return (
        case.name,
        f"{figures.logit_error:.1e}",
        f"{limits.logit:.1e}",
        f"{figures.effect_error:.1e}",
        f"{limits.effect:.1e}",
        f"{figures.effect_max:.3g}" if figures.effect_max else "-",
        f"{figures.top1:.1%}",
        f"{figures.kl:.1e}",
        verdict,
    )


def _drift_cells(case: Case) -> tuple[str, ...]:
    figures = case.drift
    assert figures is not None
    name = f"{case.name.removeprefix('drift, ')} ({case.session})"
    return (
        name,
        f"{figures.effect_error:.1e}",
        _or_dash(figures.retained, ".1%"),
        _or_dash(figures.kl, ".1e"),
        _or_dash(figures.kl_limit, ".1e"),
        _or_dash(figures.top1, ".1%"),
        _or_dash(figures.cosine, ".6f"),
        _or_dash(figures.cosine_limit, ".2f"),
        _or_dash(figures.perplexity, ".4g"),
        _or_dash(figures.exact_perplexity, ".4g"),
        case.status if case.status == "passed" else case.status.upper(),
    )


def _or_dash(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _lines(title: str, rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [title]
    for row in rows:
        cells = [
            text.ljust(width) if i in {0, len(row) - 1} else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return "\n".join(lines)
