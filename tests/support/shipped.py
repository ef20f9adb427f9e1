"""The models that ship, and the limits that bundles of them are held to whatever the floor is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lora_edge
from lora_edge.parity import Report, validate
from tests.support.paths import MODELS

BASE = MODELS / "tiny-llama"
ADAPTERS = {path.name: path for path in sorted((MODELS / "adapters").iterdir()) if path.is_dir()}
BERT = MODELS / "tiny-bert"
CLASSIFIERS = {name: MODELS / "classifiers" / name for name in ("claims", "letters")}
LIMIT = 1e-4
PROMPTS = (
    "Word: river Answer:",
    "<|user|>lemon<|end|><|assistant|>",
    "Word: silver Answer:",
    "<|user|>garden<|end|><|assistant|>",
)
"""What the adapters are asked, with words that no training has seen."""


def export_text(output: Path, *names: str, **options: Any) -> Path:
    """A bundle of the text model and of these adapters, or all."""
    lora_edge.export(
        BASE, {name: ADAPTERS[name] for name in names or ADAPTERS}, output=output, **options
    )
    return output


def export_heads(output: Path, **options: Any) -> Path:
    """A bundle of the classifiers."""
    lora_edge.export(BERT, CLASSIFIERS, output=output, **options)
    return output


def assert_within_limits(bundle: Path, steps: int) -> None:
    """Logits and effects within 1e-4 of PyTorch's and the same tokens, or an ``AssertionError``.

    Looked at are the report of the export's own check (random prompts, 64 tokens), a check with the
    adapters' own prompts, and the replay of the goldens.

    Args:
        bundle: an exported bundle of the shipped models.
        steps: greedy tokens after each of the adapters' own prompts.
    """
    (published,) = (bundle / "parity").glob("report-*.json")
    exported = json.loads(published.read_text(encoding="utf-8"))
    own = validate(bundle, BASE, steps=steps, prompts=PROMPTS)
    for report in (exported, _plain(own), _plain(validate(bundle))):
        _assert_cases(report)


def _plain(report: Report) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(report.to_json())
    return data


def _assert_cases(report: dict[str, Any]) -> None:
    measured = [case for case in report["cases"] if case["figures"]]
    assert {name for case in measured for name in case["adapters"]} == set(report["adapters"])
    for case in measured:
        figures = case["figures"]
        shown = f"{report['against']}, {case['name']}: {figures}"
        assert case["status"] == "passed", case["reason"]
        assert figures["logit_error"] <= LIMIT, shown
        assert figures["effect_error"] <= LIMIT, shown
        assert figures["token_differences"] == 0, shown
        if case["adapters"]:
            assert figures["effect_max"] > 1, shown
        for fault, error in (case["controls"] or {}).items():
            assert error > 1000 * LIMIT, f"{shown}: {fault}"
