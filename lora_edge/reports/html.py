"""A report as one HTML page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lora_edge.reports.baseline import Regression
from lora_edge.reports.charts import drawn, effect_chart
from lora_edge.reports.load import Data
from lora_edge.reports.words import (
    Case,
    cosine,
    drifts,
    failures,
    figure,
    first_layer,
    grid,
    number,
    ratio,
    reach_line,
    rows_of,
    share,
    survival_line,
    telling_first,
    times,
    unsaid_layer,
    verdict,
    within,
    worst,
)

_OPEN = 3  # failures that are shown unfolded
_BEFORE, _BEHIND = 4, 4  # layers shown around the first that differs
_WORDS = {
    "multiple": "limit / noise floor",
    "sensitivity": "largest error a proof may miss",
    "prompts": "own prompts",
    "seed": "seed of prompts",
}


def html(data: Data, worse: Sequence[Regression] = ()) -> str:
    """The page.

    Args:
        data: a report.
        worse: what is worse than an earlier report.
    """
    environment = Environment(
        loader=PackageLoader("lora_edge.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "share": share,
        "cosine": cosine,
        "figure": figure,
        "power": _power,
    }
    bad = telling_first(failures(data))
    sessions = [session["name"] for session in data["sessions"]]
    maps = [_map(data["cases"], data["adapters"], "")]
    if len(sessions) > 1:
        maps += [
            _map([c for c in data["cases"] if c["session"] == name], data["adapters"], name)
            for name in sessions
        ]
    return environment.get_template("report.html.j2").render(
        data=data,
        verdict=verdict(data),
        reach=reach_line(data),
        survival=survival_line(data),
        status=_status(data, worse),
        worse=worse,
        located=next(((case, layer) for case in bad if (layer := first_layer(case))), None),
        failures=[_failure(case) for case in bad],
        open=_OPEN,
        maps=maps,
        chart=effect_chart(data["cases"]),
        left_out=sum(bool(c["figures"]) and not drawn(c) for c in data["cases"]),
        tokens=_tokens(data["cases"]),
        layers=[_layers(case) for case in bad if case["layers"]],
        drifts=drifts(data["cases"]),
        tasks=[case for case in data["cases"] if case["task"]],
        words=_WORDS,
        placements=[_placement(session) for session in data["sessions"]],
    )


def _status(data: Data, worse: Sequence[Regression]) -> str:
    if data["passed"]:
        return "failed" if worse else "passed"
    failed = any(case["status"] == "failed" for case in data["cases"])
    return "failed" if failed or worse else "unproved"


def _failure(case: Case) -> dict[str, Any]:
    return {"case": case, "layer": unsaid_layer(case)}


def _map(cases: Sequence[Case], adapters: Sequence[str], session: str) -> dict[str, Any]:
    """Adapter x state: the worst status, and the largest part of a limit that an error takes."""
    names, columns, cells = grid(cases, adapters)
    rows = [
        {"name": name, "cells": [_cell(cells.get((name, state), [])) for state in columns]}
        for name in names
    ]
    return {"session": session, "columns": columns, "rows": rows}


def _cell(cases: Sequence[Case]) -> dict[str, Any] | None:
    if not cases:
        return None
    status = worst(cases)
    own = [case for case in cases if case["status"] == status]
    ratios = [value for case in own if (value := ratio(case)) is not None]
    text = {"passed": "equal", "failed": "differs", "unproved": "unproved"}[status]
    if status != "unproved" and ratios:
        text = times(max(ratios))
    elif drifted := drifts(own):
        apart = [case["drift"]["kl"] for case in drifted]
        text = f"KL {number(max(x or 0.0 for x in apart))}" if any(apart) else "drift"
    elif own[0]["task"]:
        text = figure(own[0]["task"]["bundle"])
    return {
        "status": status,
        "text": text,
        # From the floor (a tenth of the limit) to the limit: the darker, the closer.
        "weight": round(18 + 42 * min(1.0, max(0.0, 1 + math.log10(max(ratios)))))
        if status == "passed" and ratios and max(ratios) > 0
        else (18 if status == "passed" else 36),
        "title": "; ".join(case["reason"] or case["name"] for case in own[:3]),
    }


def _tokens(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Agreement of the best tokens, for each adapter over all its cases."""
    rows: dict[str, list[Case]] = {}
    for case in cases:
        if case["figures"] and len(case["adapters"]) <= 1:
            rows.setdefault(rows_of(case)[0], []).append(case)
    found = []
    for name, own in rows.items():
        figures = [case["figures"] for case in own]
        positions = sum(each["positions"] for each in figures)
        agree = sum((each["top1"] or 0) * each["positions"] for each in figures)
        kl = [each["kl"] for each in figures if each["kl"] is not None]
        found.append(
            {
                "name": name,
                "positions": positions,
                "top1": agree / positions if positions else None,
                "ties": sum(each["token_ties"] for each in figures),
                "differences": sum(each["token_differences"] for each in figures),
                "kl": max(kl, default=None),
            }
        )
    return found


def _layers(case: Case) -> dict[str, Any]:
    """The layers around the first that differs, with places on a logarithmic scale in percent."""
    layers = case["layers"]
    first = first_layer(case)
    paths = [layer["path"] for layer in layers]
    at = paths.index(first["path"]) if first else len(layers) - 1
    shown = layers[max(0, at - _BEFORE) : at + _BEHIND + 1]
    values = [x for each in shown for x in (each["error"], each["limit"]) if x and x > 0]
    low = math.floor(math.log10(min(values, default=1e-9)) - 0.1)
    high = max(low + 1, math.ceil(math.log10(max(values, default=1.0))))

    def place(value: float | None) -> float:
        if value is None:
            return 100.0
        return 0.0 if value <= 0 else round(100 * (math.log10(value) - low) / (high - low), 1)

    rows = [
        {
            "path": each["path"],
            "error": each["error"],
            "limit": each["limit"],
            "place": place(each["error"]),
            "mark": place(each["limit"]),
            "status": "passed" if within(each) else "failed",
            "first": first is not None and each["path"] == first["path"],
        }
        for each in shown
    ]
    before = max(0, at - _BEFORE)
    return {
        "case": case,
        "rows": rows,
        "before": before,
        "behind": len(layers) - len(shown) - before,
        "scale": (10.0**low, 10.0**high),
    }


def _power(value: float) -> str:
    return f"{value:g}" if value >= 0.01 else f"{value:.0e}"


def _placement(session: dict[str, Any]) -> dict[str, Any]:
    placed = session["placement"]
    nodes = {provider: sum(operators.values()) for provider, operators in (placed or {}).items()}
    return {**session, "nodes": nodes}
