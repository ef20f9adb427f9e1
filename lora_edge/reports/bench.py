"""The JSON of a benchmark as a table for people, as Markdown for documentation, and as a chart.

Reads the JSON of ``lora-edge bench --json`` and nothing else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lora_edge.errors import DataError
from lora_edge.files.json import read_json
from lora_edge.reports.load import Data, described

Figure = dict[str, Any]
Entry = dict[str, Any]

_WIDE = 10  # times: an interval that says nothing
_UNKNOWN = ("", "not resolved")
_HINT = "Write one with: lora-edge bench BUNDLE --json FILE"
_LEFT, _WIDTH, _RIGHT, _LINE, _HEAD = 270, 760, 120, 20, 34
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:currentColor}.t{font-weight:600}.v{opacity:.75}"
    ".one{stroke:currentColor;opacity:.4}.band{fill:currentColor;opacity:.1}"
    ".bar{stroke:currentColor;stroke-width:1.5}.dot{fill:currentColor}.no{opacity:.45}"
)


def load_bench(path: str | os.PathLike[str]) -> Data:
    """Read what ``bench --json`` wrote.

    Raises:
        DataError: the file is missing, or is no such report.
    """
    data = read_json(Path(path), DataError, _HINT)
    fault = f"{os.fspath(path)} is no report of a benchmark"
    return described(data, "bench.schema.json", fault, _HINT)


def table(data: Data) -> str:
    """All figures, for people at a terminal."""
    lines = [heading(data), ""]
    width = max(len(x["name"]) for figure in data["figures"] for x in figure["entries"])
    for figure in data["figures"]:
        unit = figure["unit"]
        lines.append(f"{figure['title']}  ({resolves(figure)})")
        lines.append(f"  {'':{width}}  {unit:>10}   / {figure['reference']}")
        for entry in figure["entries"]:
            words = f"{compared(entry):26}  {entry['verdict']}".rstrip()
            lines.append(f"  {entry['name']:{width}}  {shown(entry['value']):>10}   {words}")
        lines.append("")
    lines += [f"left out: {name}: {reason}" for name, reason in data["left_out"].items()]
    return "\n".join(lines).rstrip()


def markdown(data: Data, names: Sequence[str] = ()) -> str:
    """Tables for documentation.

    Args:
        data: the report.
        names: of the figures that are wanted; none: all.
    """
    lines = []
    for figure in data["figures"]:
        if names and figure["name"] not in names:
            continue
        lines += [
            f"| {figure['title']} | {figure['unit']} | / {figure['reference']} (95 %) | |",
            "|---|---:|---|---|",
        ]
        for entry in figure["entries"]:
            cells = entry["name"], shown(entry["value"]), compared(entry), entry["verdict"]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, f"{heading(data)}."])


def heading(data: Data) -> str:
    """What ran on what, in one line."""
    settings, versions = data["settings"], data["versions"]
    ran = ", ".join(
        f"{name} {versions[name]}"
        for name in ("lora-edge", "onnxruntime", "onnxruntime-genai")
        if name in versions
    )
    clock = "CPU time" if settings["clock"] == "cpu" else "wall clock"
    return (
        f"{data['machine']['processor']}, {_plural(settings['threads'], 'thread')}, {clock}, "
        f"{_plural(settings['processes'], 'process', 'processes')} of "
        f"{_plural(settings['steps'], 'turn')}; {ran}"
    )


def _plural(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def resolves(figure: Figure) -> str:
    """What a figure can tell apart, in words."""
    share = figure["resolution"]
    if share == 0:
        return "counted"
    if share is None:
        return "one process has no spread: nothing is resolved"
    if share >= 1:
        return "the reference differs from itself too much: nothing below twice is resolved"
    return f"differences below {share:.1%} are not resolved"


def compared(entry: Entry) -> str:
    """A ratio and its spread."""
    found = entry["ratio"]
    return "1" if found is None else spread(found, known=entry["verdict"] not in _UNKNOWN)


def spread(found: Mapping[str, Any], *, known: bool = False) -> str:
    """A ratio and its 95 % interval.

    Args:
        found: ``value``, ``low`` and ``high``.
        known: it is judged, and its interval is shown however wide it is.
    """
    if found["low"] is None or found["low"] == found["high"]:
        return f"{found['value']:.3f}"
    if found["high"] > _WIDE * found["low"] and not known:
        return f"{found['value']:.3f} (too wide a spread)"
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def shown(value: float) -> str:
    """A figure with three digits or more."""
    if value < 0:
        return f"-{shown(-value)}"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def chart(data: Data) -> str:
    """Every ratio with its interval, as SVG that stands alone; the band is what is not resolved."""
    ratios = [
        (figure, [entry for entry in figure["entries"] if entry["ratio"] is not None])
        for figure in data["figures"]
    ]
    ratios = [(figure, entries) for figure, entries in ratios if entries]
    values = [entry["ratio"]["value"] for _, entries in ratios for entry in entries]
    low, high = min([0.5, *values]) / 1.15, max([2.0, *values]) * 1.15
    height = sum(_HEAD + _LINE * len(entries) for _, entries in ratios) + _LINE

    def x(value: float) -> float:
        share = math.log(min(max(value, low), high) / low) / math.log(high / low)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="Ratios with their 95 % intervals"><style>{_STYLE}</style>'
        f"<title>{escape(heading(data))}</title>"
    ]
    top = 0
    for figure, entries in ratios:
        foot = top + _HEAD + _LINE * len(entries)
        lines.append(
            f'<text class="t" x="8" y="{top + 20}">{escape(figure["title"])}'
            f'<tspan class="v"> ({escape(figure["unit"])} / {escape(figure["reference"])}, '
            f"{figure['better']} is better)</tspan></text>"
        )
        share = figure["resolution"]
        if share:
            left, right = x(1 / (1 + share)), x(1 + share)
            lines.append(
                f'<rect class="band" x="{left:.1f}" y="{top + _HEAD - 8}" '
                f'width="{right - left:.1f}" height="{foot - top - _HEAD}"/>'
            )
        lines.append(
            f'<line class="one" x1="{x(1):.1f}" x2="{x(1):.1f}" y1="{top + _HEAD - 8}" '
            f'y2="{foot - 8}"/>'
        )
        for place, entry in enumerate(entries):
            lines.append(_mark(entry, x, top + _HEAD + _LINE * place + 2))
        top = foot
    return "".join([*lines, "</svg>\n"])


def _mark(entry: Entry, x: Any, y: float) -> str:
    found = entry["ratio"]
    style = ' class="no"' if entry["verdict"] in _UNKNOWN else ""
    ends = (found["low"], found["high"])
    bar = ""
    if None not in ends:
        bar = f'<line class="bar" x1="{x(ends[0]):.1f}" x2="{x(ends[1]):.1f}" y1="{y}" y2="{y}"/>'
    return (
        f'<g{style}><text x="20" y="{y + 4}">{escape(entry["name"])}</text>{bar}'
        f'<circle class="dot" cx="{x(found["value"]):.1f}" cy="{y}" r="3.5"/>'
        f'<text class="v" x="{_WIDTH - _RIGHT + 10}" y="{y + 4}">{found["value"]:.3f}</text></g>'
    )
