"""A report as Markdown, for the summary of a CI job."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lora_edge.reports import words
from lora_edge.reports.baseline import Regression
from lora_edge.reports.load import Data

_SIGNS = {"passed": "✅", "failed": "❌", "unproved": "⚠️"}
_MOST = 20  # failures that are listed


def markdown(data: Data, worse: Sequence[Regression] = ()) -> str:
    """Verdict, a table of adapters and states, failures, and what ran on what, folded.

    Args:
        data: a report.
        worse: what is worse than an earlier report.
    """
    bad = words.telling_first(words.failures(data))
    sign = _SIGNS["passed" if data["passed"] and not worse else "failed"]
    lines = [
        f"## {sign} lora-edge: {_text(words.verdict(data))}",
        "",
        f"{_code(data['bundle'])} ({data['mode']}, base {_text(data['base'])}), against "
        f"{'PyTorch' if data['against'] == 'reference' else 'its golden cases'}, "
        f"{data['seconds']:.1f} s",
        "",
        *([_text(words.reach_line(data)), ""] if words.reach_line(data) else []),
        *([_text(words.survival_line(data)), ""] if words.survival_line(data) else []),
        *_table(data),
    ]
    if bad:
        lines += ["", "### What did not pass", ""]
        for case in bad[:_MOST]:
            lines.append(f"- {_SIGNS[case['status']]} {_text(case['reason'])}")
            layer = words.unsaid_layer(case)
            if layer:
                lines.append(f"  - the first layer that differs is {_code(layer['path'])}")
        if len(bad) > _MOST:
            lines.append(f"- and {len(bad) - _MOST} more")
        fence = "`" * max(3, _longest_run(data["command"]) + 1)
        lines += ["", f"{fence}sh", data["command"], fence]
        if data["repro"]:
            lines += [
                "",
                f"The first failure alone, for plain ONNX Runtime: {_code(data['repro'])}",
            ]
    lines += _drift(data)
    if worse:
        lines += ["", "### Worse than before", ""]
        lines += [f"- {_text(each.text)}" for each in worse]
    lines += ["", "<details><summary>Figures</summary>", "", *_figures(data), "", "</details>"]
    ran = [f"{name} {value}" for name, value in {**data["versions"], **data["machine"]}.items()]
    lines += ["", "<details><summary>What ran on what</summary>", ""]
    lines += [_text(", ".join(ran)), "", "</details>"]
    return "\n".join(lines) + "\n"


def _table(data: Data) -> list[str]:
    names, used, cells = words.grid(data["cases"], data["adapters"])
    lines = ["| adapter | " + " | ".join(used) + " |", "|---|" + "---|" * len(used)]
    for name in names:
        shown = [_cell(cells.get((name, state), [])) for state in used]
        lines.append(f"| {_text(name)} | " + " | ".join(shown) + " |")
    return lines


def _cell(cases: Sequence[words.Case]) -> str:
    if not cases:
        return ""
    sign = _SIGNS[words.worst(cases)]
    ratios = [value for case in cases if (value := words.ratio(case)) is not None]
    return f"{sign} {words.times(max(ratios))} of limit" if ratios else sign


def _drift(data: Data) -> list[str]:
    found = words.drifts(data["cases"])
    if not found:
        return []
    half = any(each["precision"] == "fp16" for each in data["sessions"])
    what = "float16 against float32" if half else "int8 activations against floats"
    lines = [
        "",
        f"### Quantization drift: {what}, on the same weights",
        "",
        "| session | case | KL | limit | effect that is there | effect error | top-1 | cosine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in found:
        own = case["drift"]
        cells = [
            case["session"],
            _text(case["name"]),
            words.number(own["kl"]),
            words.number(own["kl_limit"]),
        ]
        cells += [
            words.share(own["retained"]),
            words.number(own["effect_error"]),
            words.share(own["top1"]),
        ]
        cells += [words.cosine(own.get("cosine"))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _figures(data: Data) -> list[str]:
    lines = [
        "| session | case | logit error | limit | effect error | limit | top-1 | KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in data["cases"]:
        figures, limits = case["figures"], case["limits"]
        if figures and limits:
            cells = [
                case["session"],
                _text(case["name"]),
                words.number(figures["logit_error"]),
                words.number(limits["logit"]),
                words.number(figures["effect_error"]),
                words.number(limits["effect"]),
                words.share(figures["top1"]),
                words.number(figures["kl"]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _code(text: str) -> str:
    """Text as it is; what quotes it is longer than what it holds."""
    quote = "`" * (_longest_run(text) + 1)
    space = " " if "`" in text else ""
    return f"{quote}{space}{' '.join(text.splitlines())}{space}{quote}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _text(text: str) -> str:
    """Text that means nothing to Markdown or HTML."""
    for sign in "\\`*_[]|~$":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
