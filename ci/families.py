"""The table of docs/families.md, from the results of the tests (junit xml)."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

from pages import written

BEGIN, END = "<!-- families: made by ci/families -->", "<!-- families: end -->"
_FIGURES = tuple(
    f"{mode} {figure}"
    for mode in ("switchable", "merged")
    for figure in ("logit_error", "effect_error")
)


def results(xml: str) -> list[dict[str, str]]:
    """What each test recorded, and ``passed``: ``yes`` or ``NO``."""
    found = []
    for case in ElementTree.fromstring(xml).iter("testcase"):
        recorded = {each.attrib["name"]: each.attrib["value"] for each in case.iter("property")}
        broken = any(case.find(tag) is not None for tag in ("failure", "error", "skipped"))
        found.append(recorded | {"passed": "NO" if broken else "yes"})
    return found


def table(xml: str) -> str:
    """Markdown: a row for each family and form, then the families that are refused."""
    rows = results(xml)
    lines = [
        "| family | form | switchable: logit error | relative to effect | merged: logit error "
        "| relative to effect | passed |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted((row for row in rows if "form" in row), key=lambda row: row["family"]):
        figures = [f"{float(row[name]):.1e}" if name in row else "-" for name in _FIGURES]
        lines.append(
            f"| {row['family']} | {row['form']} | {' | '.join(figures)} | {row['passed']} |"
        )
    lines += ["", "| refused | how |", "|---|---|"]
    for row in rows:
        if "refusal" in row:
            lines.append(f"| {row['family']} | {row['refusal']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    page = Path(sys.argv[2])
    made = table(Path(sys.argv[1]).read_text(encoding="utf-8"))
    text = page.read_text(encoding="utf-8")
    page.write_text(written(text, made, BEGIN, END), encoding="utf-8")
