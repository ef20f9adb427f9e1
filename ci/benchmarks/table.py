"""`ci/bench table` and `ci/bench decode`: what is to be reached, and what is.

Models of real shapes with random weights, adapters of rank 16 on all linear layers. Contestants run
in fresh processes and take turns in shuffled order; the reference is entered twice, and nothing
below its ratio to itself is judged. Ratios are of speeds, with their 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from commands import COMMANDS, measure_command
from made import Made
from row import LackingError, Row
from rows import BENCHES, DECODE, NATIVE, ROWS, limit_by_bytes
from shapes import SHAPES, facts

from lora_edge.bench.plan import Plan, Settings
from lora_edge.bench.ratios import Ratio, ratio, reached
from lora_edge.bench.results import ratio_of, resolution_of, results
from lora_edge.bench.rounds import Costs, run_round
from lora_edge.bench.run import tried
from lora_edge.errors import MissingDependencyError
from lora_edge.reports.bench import shown, spread
from lora_edge.runtime.native import library
from lora_edge.runtime.native.build import build

Line = dict[str, Any]


PRECISIONS = f"fp32,int4,int4 head4,{NATIVE}"


def line_of(row: Row, shape: str, precision: str, plan: Plan, rounds: Sequence[Costs]) -> Line:
    """One row of the table, from what was measured.

    Args:
        row: the row.
        shape: name of the shape.
        precision: of the bundle.
        plan: the bench, without those that could not run.
        rounds: one for each round.
    """
    line = _line(row, shape, precision)
    figure = next(x for x in plan.figures if x.name == row.figure)
    names = {taker.name for taker in figure.takers}
    for wanted in (row.own, row.other, *row.beside):
        if wanted and wanted not in names:
            reason = plan.left_out.get(wanted, "it does not take part here")
            return {**line, "verdict": f"not measured: {wanted}: {reason}"}
    costs = [one[figure.name] for one in rounds]
    resolved = resolution_of(figure, costs)
    line["resolution"] = resolved
    if row.kind == "ratio":
        found = ratio_of(figure, costs, row.own, row.other)
        if row.beside:
            found = _beside(row, costs)
            resolved = None if resolved is None else (1 + resolved) ** 2 - 1
            line["resolution"] = resolved
        line |= {"ratio": asdict(found)}
        return line | {"verdict": _verdict(found, resolved, line)}
    other = row.other or figure.takers[0].name
    base = [one[other] for one in costs] if row.kind == "difference" else [0.0] * len(costs)
    values = [(one[row.own] - b) * figure.scale for one, b in zip(costs, base, strict=True)]
    return line | _absolute(values, line["target"])


def _beside(row: Row, costs: Sequence[Mapping[str, float]]) -> Ratio:
    """How the ratio of two rates compares with that of two others."""
    over, under = row.beside
    return ratio(
        [one[row.other] * one[over] for one in costs], [one[row.own] * one[under] for one in costs]
    )


def _line(row: Row, shape: str, precision: str) -> Line:
    any_shape = row.targets.get(precision, row.targets[""])
    target = row.targets.get(f"{shape} {precision}", any_shape)
    return {
        "row": row.name,
        "text": row.text,
        "shape": shape,
        "precision": precision,
        "target": target or None,
        "least": row.least,
        "ratio": None,
        "values": None,
        "resolution": None,
        "limit": None,
        "verdict": "",
    }


def _verdict(found: Ratio, resolved: float | None, line: Line) -> str:
    if line["target"] is None:
        return ""
    return reached(found, resolved, line["target"], least=line["least"])


def _absolute(values: Sequence[float], target: float) -> Line:
    """A figure that is compared with nothing: reached if every process reaches it."""
    if max(values) <= target:
        word = "reached"
    else:
        word = "missed" if min(values) > target else "not resolved"
    return {"values": list(values), "verdict": word}


def table(lines: Sequence[Line]) -> str:
    """The table as Markdown, for people and for the documentation."""
    head = "| figure | shape | measured (95 %) | not resolved below | limit by bytes | target | |"
    made = [head, "|---|---|---|---:|---:|---:|---|"]
    for line in lines:
        resolved, limit, target = line["resolution"], line["limit"], line["target"]
        sign = "≥" if line["least"] else "≤"
        cells = [
            line["text"],
            f"{line['shape']} {line['precision']}".strip(),
            _measured(line),
            "" if line["ratio"] is None else _share(resolved),
            "" if limit is None else f"{limit:.3f}",
            "" if target is None else f"{sign} {target:g}",
            line["verdict"],
        ]
        made.append("| " + " | ".join(cells) + " |")
    return "\n".join(made)


def _share(resolved: float | None) -> str:
    if resolved is None or resolved >= 1:
        return "anything"  # one process, or a reference that differs from itself twofold
    return "" if resolved == 0 else f"{resolved:.1%}"


def _measured(line: Line) -> str:
    if line["ratio"] is not None:
        return spread(line["ratio"], known=line["verdict"] in ("reached", "missed"))
    values = line["values"]
    if values is None:
        return "–"
    ends = "" if len(values) == 1 else f" [{shown(min(values))}, {shown(max(values))}]"
    return f"{shown(median(values))}{ends}"


def run_bench(
    name: str, rows: Sequence[Row], made: Made, precision: str, settings: Settings
) -> tuple[list[Line], Mapping[str, Any] | None]:
    """The rows of one bench, and everything that it measured."""
    os.environ[library.SWITCH] = "1" if precision == NATIVE else "0"
    try:
        if precision == NATIVE:
            _build_library()
        plan = tried(BENCHES[name](made, precision), settings, _say)
    except LackingError as reason:
        skipped = [_line(row, made.name, precision) for row in rows]
        return [{**line, "verdict": f"not measured: {reason}"} for line in skipped], None
    rounds = []
    for index in range(settings.processes):
        rounds.append(run_round(plan, settings, index))
        _say(f"{made.name} {precision} {name}: {index + 1} of {settings.processes} done")
    lines = [line_of(row, made.name, precision, plan, rounds) for row in rows]
    for row, line in zip(rows, lines, strict=True):
        if row.limit:
            line["limit"] = limit_by_bytes(made.bundle(precision))
    about = {"bench": name, "shape": made.name, "precision": precision, **facts(made.shape)}
    return lines, results(plan, settings, rounds, about)


def _build_library() -> None:
    """Build the native library, if it is not there."""
    if library.find() is None:
        try:
            build(say=_say)
        except MissingDependencyError as reason:
            raise LackingError(str(reason)) from reason


def _command(name: str, made: Made, processes: int) -> Line:
    """A row of a whole command, in processes of their own."""
    row = COMMANDS[name]
    values = [measure_command(name, made) for _ in range(processes)]
    line = {**_line(row, made.name, ""), **_absolute(values, row.targets[""])}
    if row.kind == "ratio":
        line |= {"ratio": asdict(ratio(values, [1.0] * len(values))), "values": values}
    return line


def main() -> None:
    chosen = _options()
    if chosen.cpu_time and chosen.threads != 1:
        raise SystemExit("--cpu-time is the time of one thread: give --threads 1")
    if chosen.docs:
        print(table(json.loads(chosen.docs.read_text(encoding="utf-8"))["rows"]))
        return
    known = [*(row.name for row in ROWS), *COMMANDS]
    wanted = chosen.rows.split(",") if chosen.rows else [row.name for row in ROWS]
    wanted = [x for name in wanted for x in (DECODE if name == "decode" else (name,))]
    for name in wanted:
        if name not in known:
            raise SystemExit(f"{name!r} is no row; rows are decode, {', '.join(known)}")
    for name in chosen.shapes.split(","):
        if name not in SHAPES:
            raise SystemExit(f"{name!r} is no shape; shapes are {', '.join(SHAPES)}")
    clock = "cpu" if chosen.cpu_time else "wall"
    settings = Settings(chosen.processes, chosen.steps, chosen.threads, clock, chosen.seed)
    lines: list[Line] = []
    measured: list[Any] = []
    with ExitStack() as stack:
        folder = chosen.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for shape in chosen.shapes.split(","):
            made = Made(folder, shape, _say)
            for name in BENCHES:
                for precision in chosen.precisions.split(","):
                    rows = [
                        row
                        for row in ROWS
                        if row.bench == name and row.name in wanted and precision in row.precisions
                    ]
                    if rows:
                        found, data = run_bench(name, rows, made, precision, settings)
                        lines += found
                        measured += [] if data is None else [data]
                        _write(chosen.json, lines, measured, settings)
            for name in [x for x in wanted if x in COMMANDS]:
                lines.append(_command(name, made, chosen.processes))
                _write(chosen.json, lines, measured, settings)
    print(table(lines))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ci/bench table", description=__doc__)
    add = parser.add_argument
    add("--shapes", default="135M", help=f"of {', '.join(SHAPES)} (default 135M)")
    add("--rows", help="names, or decode for the rows in float32 (default: all but commands)")
    add("--precisions", default=PRECISIONS, help=f"default {PRECISIONS}")
    add("--processes", type=int, default=6, help="fresh processes (default 6)")
    add("--steps", type=int, default=24, help="turns in each, of two tokens (default 24)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--cpu-time", action="store_true", help="with one thread: the time that it ran")
    add("--seed", type=int, default=0)
    add("--work", type=Path, help="keep models and bundles there for the next time")
    add("--json", type=Path, help="write everything to this file")
    add("--docs", type=Path, help="measure nothing: print the table of such a file")
    return parser.parse_args()


def _write(
    file: Path | None, lines: Sequence[Line], measured: Sequence[Any], settings: Settings
) -> None:
    if file is not None:
        whole = {"settings": asdict(settings), "rows": lines, "benches": measured}
        file.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
