"""How a report's figures and cases are put into words, the same in every format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lora_edge.reports.load import Data

Case = Mapping[str, Any]

COLUMNS = (
    "alone", "long prompts", "blend", "mixed rows", "switching", "your prompts", "task metric",
    "around", "weights", "drift",
)  # fmt: skip
"""Adapter states, in the order in which they are shown."""

_KINDS = {
    "base": "alone",
    "adapter": "alone",
    "proof": "alone",
    "blend": "blend",
    "mixed": "mixed rows",
    "switch": "switching",
    "task": "task metric",
    "around": "around",
    "weights": "weights",
    "drift": "drift",
}
_PARTS = {
    ", given prompts": "your prompts",
    ", long prompt": "long prompts",
    ", prompt of ": "long prompts",
}
_WORST = ("failed", "unproved", "passed")
NO_ADAPTER = "no adapter"


class Grid(NamedTuple):
    """Adapters x states.

    Attributes:
        rows: the adapters.
        columns: the states.
        cells: (adapter, state) -> its cases; without those that have none.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    cells: Mapping[tuple[str, str], Sequence[Case]]


def column(case: Case) -> str:
    """The adapter state that a case belongs to, of :data:`COLUMNS`."""
    if case["kind"] in {"base", "adapter"}:
        for words, found in _PARTS.items():
            if words in case["name"]:
                return found
    return _KINDS[case["kind"]]


def reach_line(data: Data) -> str:
    """How far the run went, in a line; empty in reports of earlier versions."""
    return str((data.get("reach") or {}).get("line", ""))


def survival_line(data: Data) -> str:
    """What is left of a merged and rounded adapter; empty of others, and in earlier reports."""
    return str(data.get("survival", ""))


def rows_of(case: Case) -> tuple[str, ...]:
    """The adapters whose rows of a table a case belongs in."""
    return tuple(case["adapters"]) or (NO_ADAPTER,)


def grid(cases: Sequence[Case], adapters: Sequence[str]) -> Grid:
    """The cases by adapter and state: the rows and columns that have any, in order, and the cells.

    Args:
        cases: of a report.
        adapters: of that report, in the order of their rows.
    """
    cells: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        for row in rows_of(case):
            cells.setdefault((row, column(case)), []).append(case)
    return Grid(
        [name for name in (NO_ADAPTER, *adapters) if any(row == name for row, _ in cells)],
        [name for name in COLUMNS if any(state == name for _, state in cells)],
        cells,
    )


def worst(cases: Sequence[Case]) -> str:
    """The worst status of some cases."""
    return min((str(case["status"]) for case in cases), key=_WORST.index)


def failures(data: Data) -> list[Case]:
    """The cases that did not pass."""
    return [case for case in data["cases"] if case["status"] != "passed"]


def verdict(data: Data) -> str:
    """The outcome in a sentence."""
    cases, bad = data["cases"], failures(data)
    if not cases:
        return "Nothing was compared, so nothing is proved."
    if data["passed"]:
        count = len(data["adapters"])
        who = "adapters do" if count > 1 else "adapter does" if count else "base does"
        they = "they" if count > 1 else "it"
        return f"All {len(cases)} cases passed: the {who} what {they} did in PyTorch."
    failed = sum(case["status"] == "failed" for case in bad)
    unproved = len(bad) - failed
    parts = []
    if failed:
        parts.append(f"{failed} of {len(cases)} cases {'differs' if failed == 1 else 'differ'}")
    if unproved:
        which = f"{unproved} more" if failed else f"{unproved} of {len(cases)} cases"
        parts.append(f"{which} {'is' if unproved == 1 else 'are'} not proved")
    names = _culprits(bad)
    return ", ".join(parts) + (f": {listed(names)}." if names else ".")


def _culprits(bad: Sequence[Case]) -> list[str]:
    """Who fails alone; a blend's failure is that one's fault. None if the base fails itself."""
    if any(case["kind"] == "base" for case in bad):
        return ["the base itself"]
    alone = {case["adapters"][0] for case in bad if len(case["adapters"]) == 1}
    others = {name for case in bad for name in case["adapters"]}
    return sorted(alone or others) or ["rows without an adapter"]


def telling_first(bad: Sequence[Case]) -> list[Case]:
    """The failures, one of each culprit before what follows from it, else in their order.

    First comes the base, then cases whose layers were compared, then each adapter's first failure
    of its own, then the rest.
    """
    leading: dict[tuple[str, ...], Case] = {}
    for case in sorted(bad, key=lambda case: (case["kind"] != "base", not case["layers"])):
        if len(case["adapters"]) < 2 or case["layers"]:
            leading.setdefault(tuple(case["adapters"]), case)
    first = list(leading.values())
    return first + [case for case in bad if not any(case is each for each in first)]


def listed(names: Sequence[str], most: int = 4) -> str:
    """``a, b, c and 5 more``."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def first_layer(case: Case) -> Mapping[str, Any] | None:
    """The first layer that differs, where layers were compared."""
    return next((layer for layer in case["layers"] if not within(layer)), None)


def within(layer: Mapping[str, Any]) -> bool:
    """Whether a layer is as near to PyTorch's as its limit; NaN and Inf (``None``) are not."""
    error, limit = layer["error"], layer["limit"]
    return error is not None and (limit is None or error <= limit)


def unsaid_layer(case: Case) -> Mapping[str, Any] | None:
    """The first layer that differs, where the case's reason does not name it."""
    layer = first_layer(case)
    return None if layer is None or layer["path"] in case["reason"] else layer


def ratio(case: Case) -> float | None:
    """How much of its limit the worse of a case's errors takes; ``None`` where none was measured.

    Of errors bit for bit or without finite figures there is none.
    """
    figures, limits = case["figures"], case["limits"]
    if figures is None or limits is None:
        return None
    found = [
        figures[error] / limits[limit]
        for error, limit in (("logit_error", "logit"), ("effect_error", "effect"))
        if figures[error] is not None and limits[limit]
    ]
    return max(found, default=None)


def drifts(cases: Sequence[Case]) -> list[Case]:
    """The cases that tell what int8 activations add; reports of earlier versions have none."""
    return [case for case in cases if case.get("drift")]


def times(value: float) -> str:
    """A multiple, in percent as long as that is short."""
    return f"{value:.0%}" if value < 10 else f"{value:.1e}×" if value >= 1e4 else f"{value:,.0f}×"


def number(value: float | None) -> str:
    """A figure in two digits; ``-`` for none."""
    return "-" if value is None else f"{value:.1e}"


def figure(value: float | None) -> str:
    """A metric or an effect in up to four digits; ``not finite`` for none."""
    return "not finite" if value is None else f"{value:.4g}"


def cosine(value: float | None) -> str:
    """A cosine, which is near 1; ``-`` for none."""
    return "-" if value is None else f"{value:.6f}"


def share(value: float | None) -> str:
    """A share in percent."""
    return "-" if value is None else f"{value:.1%}"
