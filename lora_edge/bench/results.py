"""What rounds measured, as figures, ratios and words: the JSON of a benchmark.

``lora_edge/reports/bench.schema.json`` describes it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from lora_edge.bench.plan import Figure, Plan, Settings
from lora_edge.bench.ratios import Ratio, compared, ratio, resolution
from lora_edge.bench.rounds import Costs

SCHEMA_VERSION = 1
_PACKAGES = (
    "lora-edge",
    "onnxruntime",
    "onnxruntime-genai",
    "torch",
    "transformers",
    "peft",
    "optimum-onnx",
    "openvino",
)
_WORDS = {
    (True, "more"): "faster",
    (True, "less"): "slower",
    (False, "more"): "more",
    (False, "less"): "less",
}


def results(
    plan: Plan, settings: Settings, rounds: Sequence[Costs], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that was measured, as JSON.

    Args:
        plan: what was.
        settings: how.
        rounds: one for each round.
        about: what the bundle is.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "about": dict(about),
        "settings": asdict(settings),
        "machine": {
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1,
            "system": platform.platform(),
        },
        "versions": _versions(),
        "runs": dict(plan.runs),
        "figures": [_figure(figure, [x[figure.name] for x in rounds]) for figure in plan.figures],
        "left_out": dict(plan.left_out),
    }


def ratio_of(
    figure: Figure, costs: Sequence[Mapping[str, float]], name: str, other: str = ""
) -> Ratio:
    """A taker's value over another's: a ratio of rates, or of costs.

    Args:
        figure: the figure.
        costs: of each round.
        name: the taker.
        other: the one it is compared with; empty: the reference. The reference stands for both of
            its entries, but in its own comparison.
    """
    first = figure.takers[0].name
    again = first if figure.counted else figure.takers[1].name
    other = other or first
    own = [one[name] for one in costs]
    both = other == first and name != again
    others = [geometric_mean([x[other], x[again]]) if both else x[other] for x in costs]
    return ratio(others, own) if figure.rate else ratio(own, others)


def resolution_of(figure: Figure, costs: Sequence[Mapping[str, float]]) -> float | None:
    """What a figure can resolve, as a share; of files, which are counted, 0."""
    if figure.counted:
        return 0.0
    return resolution(ratio_of(figure, costs, figure.takers[1].name))


def _figure(figure: Figure, costs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    resolved = resolution_of(figure, costs)
    rate = figure.rate
    entries = []
    for place, taker in enumerate(figure.takers):
        cost = median(one[taker.name] for one in costs)
        found = ratio_of(figure, costs, taker.name) if place else None
        word = ""
        if found is not None and (place > 1 or figure.counted):
            word = _counted(found) if resolved == 0 else compared(found, resolved)
            word = _WORDS.get((rate, word), word)
        entries.append(
            {
                "name": taker.name,
                "value": figure.scale / cost if rate else cost * figure.scale,
                "costs": [one[taker.name] for one in costs],
                "ratio": None if found is None else asdict(found),
                "verdict": word,
            }
        )
    return {
        "name": figure.name,
        "title": figure.title,
        "unit": figure.unit,
        "better": "more" if rate else "less",
        "reference": figure.takers[0].name,
        "resolution": resolved,
        "entries": entries,
    }


def _counted(found: Ratio) -> str:
    if found.value == 1:
        return "equal"
    return "more" if found.value > 1 else "less"


def processor() -> str:
    """What this machine computes with."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
