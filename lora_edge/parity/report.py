"""The report of a check: data, JSON, and a table for a terminal.

Knows nothing of how the figures were made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lora_edge.parity.compare import Figures, Limits, Status

SCHEMA_VERSION = 1
Against = Literal["reference", "goldens"]

_HEADER = ("case", "logit error", "limit", "effect error", "limit", "effect", "top-1", "KL", "")


@dataclass(frozen=True)
class Case:
    """One comparison and its verdict.

    Attributes:
        name: what was run, e.g. ``adapter polite, decode``.
        adapters: the adapters that took part; empty: the base.
        status: ``passed``, ``failed`` or ``unproved``; only ``passed`` is good.
        reason: one line that names the adapter and the figures; empty when passed.
        figures: what was measured; ``None`` for a comparison bit for bit, or one that did not run.
        limits: floors and limits it was judged by; ``None`` as above.
        controls: deliberate fault -> the error measured with it, which must exceed the limit.
    """

    name: str
    adapters: tuple[str, ...]
    status: Status
    reason: str = ""
    figures: Figures | None = None
    limits: Limits | None = None
    controls: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Report:
    """What a validation found.

    Attributes:
        bundle: the bundle's folder.
        mode: ``switchable`` or ``merged``.
        against: where the expected outputs came from: PyTorch now, or the recorded goldens.
        adapters: names of the bundle's adapters.
        cases: every comparison.
        versions: packages and versions of both sides.
        seconds: how long it took.
    """

    bundle: str
    mode: str
    against: Against
    adapters: tuple[str, ...]
    cases: tuple[Case, ...]
    versions: Mapping[str, str]
    seconds: float

    @property
    def passed(self) -> bool:
        """Every case passed; an unproved one is not a pass, and neither is an empty report."""
        return bool(self.cases) and all(case.status == "passed" for case in self.cases)

    @property
    def failures(self) -> tuple[Case, ...]:
        """The cases that failed or are unproved."""
        return tuple(case for case in self.cases if case.status != "passed")

    def adapter_passed(self, name: str) -> bool:
        """The adapter was compared on its own, and every case that it took part in passed.

        A case that it shares with an adapter that fails alone does not count against it.
        """
        broken = {case.adapters for case in self.failures if len(case.adapters) == 1}
        mine = [
            case
            for case in self.cases
            if name in case.adapters
            and not any((other,) in broken for other in case.adapters if other != name)
        ]
        alone = any(case.adapters == (name,) and case.figures for case in mine)
        return alone and all(case.status == "passed" for case in mine)

    def to_json(self) -> str:
        """The report as indented JSON; NaN and Inf are null."""
        data = {
            "schema_version": SCHEMA_VERSION,
            "passed": self.passed,
            "bundle": self.bundle,
            "mode": self.mode,
            "against": self.against,
            "adapters": list(self.adapters),
            "cases": [_case(case) for case in self.cases],
            "versions": dict(self.versions),
            "seconds": round(self.seconds, 3),
        }
        return json.dumps(data, indent=1, allow_nan=False) + "\n"

    def table(self) -> str:
        """A table per adapter, then one line per failure, then the verdict."""
        blocks: list[str] = []
        for title, cases in self._groups():
            rows = [_HEADER, *(_cells(case) for case in cases)]
            blocks.append("\n".join([title, *_columns(rows)]))
        lines = [f"{case.status}: {case.reason}" for case in self.failures]
        if lines:
            blocks.append("\n".join(lines))
        return "\n\n".join([*blocks, self.summary()]) + "\n"

    def summary(self) -> str:
        """The verdict in one line."""
        source = "PyTorch" if self.against == "reference" else "the recorded goldens"
        good = sum(case.status == "passed" for case in self.cases)
        verdict = "passed" if self.passed else "NOT PASSED"
        return (
            f"{verdict}: {good} of {len(self.cases)} cases against {source}, {self.seconds:.1f} s"
        )

    def _groups(self) -> list[tuple[str, list[Case]]]:
        groups: dict[str, list[Case]] = {}
        for case in self.cases:
            if not case.adapters:
                title = "no adapter"
            elif len(case.adapters) == 1 and not case.name.startswith(("blend", "mixed")):
                title = f"adapter {case.adapters[0]}"
            else:
                title = "several adapters"
            groups.setdefault(title, []).append(case)
        return list(groups.items())


def _case(case: Case) -> dict[str, Any]:
    return {
        "name": case.name,
        "adapters": list(case.adapters),
        "status": case.status,
        "reason": case.reason,
        "figures": None if case.figures is None else _finite(vars(case.figures)),
        "limits": None if case.limits is None else _finite(vars(case.limits)),
        "controls": None if case.controls is None else _finite(case.controls),
    }


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


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


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if i in {0, len(row) - 1} else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines
