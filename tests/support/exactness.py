"""What a report must say of an adapter that is exact."""

from __future__ import annotations

from lora_edge.parity.case import Case
from lora_edge.parity.report import Report


def exact_case(report: Report, name: str, least: float) -> Case:
    """The case of an adapter, which is exact and changes outputs by more than ``least``."""
    case = next(case for case in report.cases if case.name == f"adapter {name}")
    assert case.figures is not None
    assert case.figures.effect_error <= 1e-4
    assert case.figures.effect_max > least
    return case
