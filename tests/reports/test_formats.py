"""JSON schema, JUnit, Markdown: each says what the report says."""

from __future__ import annotations

import copy
import json
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from junitparser import Failure, JUnitXml

from lora_edge.errors import DataError
from lora_edge.reports import Regression, html, junit, load_report, markdown
from lora_edge.reports.words import failures, telling_first, verdict

Reports = dict[str, dict[str, Any]]
KINDS = ("good", "faulty", "unproved")
SCHEMA = json.loads(files("lora_edge.reports").joinpath("report.schema.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_reports_follow_their_schema(reports: Reports, kind: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(reports[kind], SCHEMA)


def test_the_schema_knows_a_report_from_others(reports: Reports) -> None:
    for change in ({"schema_version": 1}, {"against": "hope"}, {"cases": [{}]}, {"new": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**reports["good"], **change}, SCHEMA)


def test_every_field_is_described() -> None:
    def fields(schema: dict[str, Any], name: str) -> None:
        for key, value in schema.get("properties", {}).items():
            assert value.get("description"), f"{name}.{key}"
        for value in schema.get("properties", {}).values():
            for inner in (value, value.get("items", {}), *value.get("oneOf", [])):
                fields(inner, name)

    fields(SCHEMA, "report")


def test_reports_are_read_back(reports: Reports, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps(reports["good"]))
    assert load_report(file) == reports["good"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[]", "no report"),
        ('{"a": 1}', "no report"),
        ('{"schema_version": 2}', "no whole report: it lacks"),
        ('{"schema_version": 1}', "a report of version 1, expected version 2"),
    ],
)
def test_what_is_no_report(tmp_path: Path, content: str | None, words: str) -> None:
    file = tmp_path / "report.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=words):
        load_report(file)


@pytest.mark.parametrize("kind", KINDS)
def test_junit_is_read_by_a_parser_that_is_not_ours(reports: Reports, kind: str) -> None:
    data = reports[kind]
    parsed = JUnitXml.fromstring(junit(data).encode())
    suites = {suite.name: list(suite) for suite in parsed}
    assert set(suites) == {case["session"] or "record" for case in data["cases"]}
    tests = {(name, test.name): test for name, cases in suites.items() for test in cases}
    assert parsed.tests == len(tests) == len(data["cases"])
    assert parsed.failures == sum(case["status"] != "passed" for case in data["cases"])
    for case in data["cases"]:
        test = tests[case["session"] or "record", case["name"]]
        if case["status"] == "passed":
            assert test.is_passed
            continue
        (failure,) = test.result
        assert isinstance(failure, Failure)
        assert failure.type == case["status"]
        assert failure.message == case["reason"]
        assert data["command"] in failure.text
        if case["figures"]:
            assert "limit" in failure.text


def test_junit_holds_any_name(reports: Reports) -> None:
    data = copy.deepcopy(reports["faulty"])
    for case in data["cases"]:
        case["name"] += ' <&"\x00\x1b>'
    (suite, *_) = JUnitXml.fromstring(junit(data).encode())
    assert all(test.name.endswith(' <&"\ufffd\ufffd>') for test in suite)


def test_what_is_worse_is_in_both(reports: Reports) -> None:
    worse = [Regression("cpu, all", "adapter echo", "adapter echo: worse")]
    parsed = JUnitXml.fromstring(junit(reports["good"], worse).encode())
    assert parsed.failures == 1
    (test,) = next(suite for suite in parsed if suite.name == "baseline")
    assert test.result[0].message == "adapter echo: worse"
    text = markdown(reports["good"], worse)
    assert "❌" in text.splitlines()[0]
    assert "- adapter echo: worse" in text


@pytest.mark.parametrize("kind", KINDS)
def test_markdown_begins_with_the_verdict(reports: Reports, kind: str) -> None:
    data = reports[kind]
    text = markdown(data)
    first = text.splitlines()[0]
    assert ("✅" in first) == data["passed"]
    for name in data["adapters"]:
        assert any(line.startswith(f"| {name} |") for line in text.splitlines())
    for case in data["cases"]:
        if case["status"] != "passed":
            assert case["reason"].replace("_", "\\_")[:40] in text
    if kind == "faulty":
        assert "mirror" in first
        assert "| echo | ✅" in text
        assert "| mirror | ❌" in text
    if kind == "unproved":
        assert "1 of" in first
        assert "not proved: shout" in first
    assert len(text) < 60_000  # a job summary holds 1 MiB


def test_markdown_means_what_it_says(reports: Reports) -> None:
    data = copy.deepcopy(reports["faulty"])
    bad = "a|b<script>`*"
    data["adapters"] = [bad]
    for case in data["cases"]:
        case["adapters"] = [bad] if case["adapters"] else []
    text = markdown(data)
    assert "<script>" not in text
    assert "a\\|b&lt;script>" in text


def test_the_verdict_blames_who_fails_alone(reports: Reports) -> None:
    data = reports["faulty"]
    blamed = {
        name for case in data["cases"] if case["status"] != "passed" for name in case["adapters"]
    }
    assert blamed == {"echo", "mirror"}  # the blend of both fails, too
    assert verdict(data).endswith(" cases differ: mirror.")
    base = copy.deepcopy(data)
    next(case for case in base["cases"] if case["name"] == "base")["status"] = "failed"
    assert verdict(base).endswith("differ: the base itself.")
    leak = copy.deepcopy(reports["good"])
    row = next(c for c in leak["cases"] if c["kind"] == "mixed" and not c["adapters"])
    row["status"], leak["passed"] = "failed", False
    count = len(leak["cases"])
    assert verdict(leak).endswith(f"1 of {count} cases differs: rows without an adapter.")


def test_each_culprit_comes_before_what_follows_from_it(reports: Reports) -> None:
    bad = [
        {"kind": kind, "adapters": names, "layers": layers}
        for kind, names, layers in (
            ("mixed", ["b"], []),
            ("blend", ["a", "b"], []),
            ("mixed", ["a"], []),
            ("adapter", ["a"], ["of it"]),
            ("base", [], []),
        )
    ]
    assert [bad.index(case) for case in telling_first(bad)] == [4, 3, 0, 1, 2]
    told = telling_first(failures(reports["faulty"]))
    assert told[0]["name"] == "adapter mirror"
    assert sorted(map(str, told)) == sorted(map(str, failures(reports["faulty"])))


def test_markdown_quotes_what_has_quotes(reports: Reports) -> None:
    text = markdown({**reports["faulty"], "bundle": "a`b``c", "command": "run ```x```"})
    assert "```a`b``c ```".replace("```a", "``` a") in text
    assert "\n````sh\nrun ```x```\n````\n" in text


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_says_how_far_the_run_went(reports: Reports, kind: str) -> None:
    data = reports[kind]
    line = data["reach"]["line"]
    assert line.startswith("Reached: prompts of up to ")
    assert " Not reached: rows of more than " in line
    assert escape(line, quote=False) in html(data).replace("&#39;", "'")
    assert line in markdown(data)
    suites = JUnitXml.fromstring(junit(data).encode())
    assert all(line in [each.value for each in suite.properties()] for suite in suites)
    # Reports of earlier versions do not say.
    old = {key: value for key, value in data.items() if key != "reach"}
    jsonschema.validate(old, SCHEMA)
    assert "Reached" not in html(old) + markdown(old) + junit(old)
