"""A report as JUnit XML: a suite for each session, a test case for each case."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree as ET

from lora_edge.reports.baseline import Regression
from lora_edge.reports.load import Data
from lora_edge.reports.words import (
    Case,
    column,
    cosine,
    drifts,
    figure,
    number,
    reach_line,
    share,
    survival_line,
    unsaid_layer,
)

_CLASS = "lora_edge"
# What XML 1.0 cannot hold; adapters' names may.
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(data: Data, worse: Sequence[Regression] = ()) -> str:
    """The XML. A case that is unproved is a failure of the type ``unproved``.

    Args:
        data: a report.
        worse: what is worse than an earlier report; a suite of its own.
    """
    cases = data["cases"]
    root = ET.Element("testsuites", _counts(cases, len(worse)), name="lora-edge validate")
    root.set("time", str(data["seconds"]))
    for session in dict.fromkeys(case["session"] for case in cases):
        own = [case for case in cases if case["session"] == session]
        suite = ET.SubElement(root, "testsuite", _counts(own), name=session or "record")
        facts = ET.SubElement(suite, "properties")
        named = {"bundle": data["bundle"], "base": data["base"], "against": data["against"]}
        lines = {"reach": reach_line(data), "survival": survival_line(data)}
        said = {name: line for name, line in lines.items() if line}
        for name, value in {**named, **said, **data["versions"]}.items():
            ET.SubElement(facts, "property", name=name, value=_clean(str(value)))
        for case in own:
            title = f"{_CLASS}.{column(case).replace(' ', '_')}"
            test = ET.SubElement(suite, "testcase", name=_clean(case["name"]), classname=title)
            if case["status"] != "passed":
                message, kind = _clean(case["reason"]), case["status"]
                failure = ET.SubElement(test, "failure", message=message, type=kind)
                failure.text = _clean(explain(data, case))
    if worse:
        suite = ET.SubElement(root, "testsuite", _counts([], len(worse)), name="baseline")
        for each in worse:
            name = _clean(f"{each.name} ({each.session})")
            test = ET.SubElement(suite, "testcase", name=name, classname=f"{_CLASS}.baseline")
            ET.SubElement(test, "failure", message=_clean(each.text), type="worse")
    ET.indent(root)
    # ElementTree of Python 3.10 would declare the encoding of the locale.
    return f"<?xml version='1.0' encoding='utf-8'?>\n{ET.tostring(root, encoding='unicode')}\n"


def explain(data: Data, case: Case) -> str:
    """Several lines on a case that did not pass: reason, figures, layer, how to repeat it."""
    lines = [case["reason"]]
    figures, limits, task = case["figures"], case["limits"], case["task"]
    if figures and limits:
        lines += [
            f"logit error   {number(figures['logit_error'])}, limit {number(limits['logit'])}, "
            f"floor {number(limits['logit_floor'])}",
            f"effect error  {number(figures['effect_error'])}, limit {number(limits['effect'])}, "
            f"floor {number(limits['effect_floor'])}",
            f"best tokens   {share(figures['top1'])} agree over {figures['positions']} positions",
        ]
    for each in drifts([case]):
        own = each["drift"]
        lines.append(
            f"drift         KL {number(own['kl'])}, limit {number(own['kl_limit'])}, effect that "
            f"is there {share(own['retained'])}, best tokens or labels {share(own['top1'])} agree, "
            f"cosine of embeddings {cosine(own.get('cosine'))}"
        )
    if task:
        lines.append(
            f"{task['metric']}: {figure(task['bundle'])} under the bundle, "
            f"{figure(task['reference'])} under PyTorch, {figure(task['base'])} without the adapter"
        )
    layer = unsaid_layer(case)
    if layer:
        lines.append(
            f"first layer that differs: {layer['path']} (error {number(layer['error'])}, limit "
            f"{number(layer['limit'])})"
        )
    if data["command"]:
        lines.append(f"again: {data['command']}")
    if data["repro"]:
        lines.append(f"reproduction: {data['repro']}")
    return "\n".join(lines)


def _counts(cases: list[Case], worse: int = 0) -> dict[str, str]:
    bad = sum(case["status"] != "passed" for case in cases) + worse
    tests = len(cases) + worse
    return {"tests": str(tests), "failures": str(bad), "errors": "0", "skipped": "0"}


def _clean(text: str) -> str:
    return _UNPRINTABLE.sub("\ufffd", text)
