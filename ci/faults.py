"""The kill table: every fault of ``tests/faults``, and every bundle that must pass.

``ci/faults`` prints it; ``ci/faults --write docs/faults.md`` also puts its short form there.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from pages import written

import lora_edge
from tests.faults.fault_table import (
    DAMAGES,
    FAULTS,
    SOURCES,
    STEPS,
    Damage,
    Fault,
    Outcome,
    outcome,
)
from tests.faults.worlds import HEALTHY, Worlds

_LIBRARIES = ("torch", "transformers", "peft", "onnxruntime")
BEGIN, END = "<!-- faults: made by ci/faults -->", "<!-- faults: end -->"


class Row(NamedTuple):
    """A fault and what was made of it, from PyTorch and from the goldens."""

    fault: Fault
    outcomes: tuple[Outcome, ...]

    @property
    def killed(self) -> bool:
        """Found, explained, and nothing else blamed, both ways."""
        return all(outcome.killed for outcome in self.outcomes)


_FIGURES = re.compile(r"exceeds the limit|^effect-relative error|^it has -?[\d.]+ times PyTorch")
_CASE = re.compile(r"^(?:adapter \S+|mixed row \d+: [^:]+|blend [^:]+|base): ")


def explanation(row: Row) -> str:
    """What ``validate`` said, without the case's name and the figures."""
    clauses = [x for x in row.outcomes[0].reason.split("; ") if not _FIGURES.search(x)]
    return _CASE.sub("", "; ".join(clauses))


def shortened(said: str) -> str:
    """An explanation for docs/faults.md: layers without their prefix, one of each list."""
    said = re.sub(r"\b(?:model|bert|transformer)(?:\.\w+)*?\.(\d\.)", r"\1", said)
    said = re.sub(r" \(relative error [^)]*\)", "", said)
    return re.sub(r"( places: [^,;]+ \([^)]*\)), [^;]*", r"\1 and others", said)


def refusal(damage: Damage, worlds: Worlds, folder: Path) -> str:
    """What ``validate`` says of a damaged bundle; empty: it does not refuse it as it should."""
    _, bundle = worlds.copy("portable", folder / "damaged")
    damage.inject(bundle)
    try:
        lora_edge.validate(bundle)
    except lora_edge.LoraEdgeError as error:
        said = str(error).replace(f"{bundle}/", "").replace(f"{bundle}: ", "")
        return said if re.search(damage.words, str(error)) else ""
    return ""


def full_table(rows: list[Row], refusals: dict[str, str]) -> str:
    """Markdown: a row for each fault, with both ways."""
    lines = ["| fault | broken | reference | goldens | explanation |", "|---|---|---|---|---|"]
    for row in rows:
        marks = ["killed" if outcome.killed else "MISSED" for outcome in row.outcomes]
        said = explanation(row).replace("|", "\\|")
        lines.append(f"| {row.fault.name} | {row.fault.how} | {' | '.join(marks)} | {said} |")
    lines += ["", "| damage, not signed again | refused with |", "|---|---|"]
    lines += [f"| {name} | {said or 'NOT REFUSED'} |" for name, said in refusals.items()]
    return "\n".join(lines)


def short_table(rows: list[Row], summary: str) -> str:
    """Markdown for docs/faults.md: fault, whether it was caught both ways, the explanation."""
    lines = ["| fault | caught | explanation |", "|---|---|---|"]
    for row in rows:
        said = shortened(explanation(row)).replace("|", "\\|")
        lines.append(f"| {row.fault.name} | {'yes' if row.killed else 'NO'} | {said} |")
    with_versions = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    last = f"Last run: {time.strftime('%Y-%m-%d')}, {with_versions}: {summary}."
    return "\n".join([*lines, "", last])


def main() -> int:
    """Run everything; 0 if every fault is killed and nothing that is whole is blamed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="a Markdown file with the table's comments")
    arguments = parser.parse_args()
    started = time.monotonic()
    with TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "worlds").mkdir()
        worlds = Worlds(root / "worlds")
        rows = []
        for fault in FAULTS:
            print(f"breaking: {fault.name}", file=sys.stderr)
            found = tuple(outcome(fault, worlds, source, root) for source in SOURCES)
            rows.append(Row(fault, found))
        refusals = {}
        for index, damage in enumerate(DAMAGES):
            own = root / f"damage-{index}"
            own.mkdir()
            refusals[damage.name] = refusal(damage, worlds, own)
        judged, alarms = 0, []
        for name in HEALTHY:
            print(f"validating what is whole: {name}", file=sys.stderr)
            base, bundle = worlds.copy(name, root / f"whole {name}")
            for report in (
                lora_edge.validate(bundle),
                lora_edge.validate(bundle, base),
                lora_edge.validate(bundle, base, seed=1, steps=STEPS),
            ):
                judged += len(report.cases)
                alarms += [f"{name}: {case.reason}" for case in report.failures]
    total = len(FAULTS) + len(DAMAGES)
    killed = sum(row.killed for row in rows) + sum(map(bool, refusals.values()))
    summary = f"killed {killed} of {total}; false alarms {len(alarms)} of {judged}"
    print(full_table(rows, refusals))
    for alarm in alarms:
        print(f"\nfalse alarm: {alarm}")
    for row in rows:
        for source, found in zip(SOURCES, row.outcomes, strict=True):
            if not found.killed:
                what = "not caught" if not found.caught else "explained as"
                what = what if found.spared else f"{what} (and others blamed)"
                print(f"\nmissed: {row.fault.name}, against {source}: {what}: {found.reason}")
    if arguments.write:
        text = arguments.write.read_text(encoding="utf-8")
        made = short_table(rows, summary)
        arguments.write.write_text(written(text, made, BEGIN, END), encoding="utf-8")
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    print(f"\n{summary}")
    return 0 if killed == total and not alarms else 1


if __name__ == "__main__":
    sys.exit(main())
