"""The table of docs/families.md is the test's own: the same families, all passed."""

from __future__ import annotations

import re

from pages import written

from tests.support.families import REFUSED, SUPPORTED
from tests.support.modules import load_file
from tests.support.paths import ROOT

maker = load_file("ci_families", ROOT / "ci" / "families.py")

RESULT = """<testsuites><testsuite>
<testcase name="a"><properties><property name="family" value="opt"/>
<property name="form" value="fused"/><property name="switchable logit_error" value="1.25e-07"/>
</properties><failure>no</failure></testcase>
<testcase name="b"><properties><property name="family" value="bloom"/>
<property name="refusal" value="bloom models are refused"/></properties></testcase>
</testsuite></testsuites>"""


def _rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def _page() -> list[list[str]]:
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert text.count(maker.BEGIN) == text.count(maker.END) == 1
    return _rows(text.partition(maker.BEGIN)[2].partition(maker.END)[0])


def test_the_table_lists_each_supported_family_in_both_forms() -> None:
    rows = [row for row in _page() if len(row) == 7][1:]
    assert [row[:2] for row in rows] == [
        [family, form] for family in sorted(SUPPORTED) for form in ("fused", "portable")
    ]
    for row in rows:
        assert all(re.fullmatch(r"\d\.\de-\d\d", figure) for figure in row[2:6])
        assert row[6] == "yes"


def test_the_table_says_how_each_refused_family_is_refused() -> None:
    rows = dict(row for row in _page() if len(row) == 2)
    del rows["refused"]
    assert set(rows) == set(REFUSED)
    for family, (_, field) in REFUSED.items():
        assert f"{family} models are refused" in rows[family]
        assert field in rows[family]


def test_a_failure_is_written_as_one() -> None:
    rows = _rows(maker.table(RESULT))
    assert rows[1] == ["opt", "fused", "1.2e-07", "-", "-", "-", "NO"]
    assert rows[3] == ["bloom", "bloom models are refused"]
    old = f"before\n{maker.BEGIN}\nold\n{maker.END}\nafter\n"
    once = written(old, "new", maker.BEGIN, maker.END)
    assert once == f"before\n{maker.BEGIN}\n\nnew\n\n{maker.END}\nafter\n"
    assert written(once, "new", maker.BEGIN, maker.END) == once
