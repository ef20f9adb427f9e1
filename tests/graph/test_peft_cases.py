"""Every LoRA configuration of PEFT's own tests: exact in a mode, or refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lora_edge
from lora_edge.names import parse_lora_input
from tests.support.custom_operators import Custom, error_and_effect, load, make_custom_adapter
from tests.support.paths import ROOT
from tests.support.peft_cases import MORE_CASES, PEFT_CASES, make_model, summary

CASES = {**PEFT_CASES, **MORE_CASES}
LIMIT = 3e-6
"""Of the effect, or of 1 where the effect is smaller."""


def test_no_case_is_lost() -> None:
    assert len(PEFT_CASES) == 46
    assert len(CASES) == len(PEFT_CASES) + len(MORE_CASES)


@pytest.mark.parametrize("name", CASES)
def test_exact_or_refused(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, x = make_model(case.model)
    custom = Custom(model, x, tmp_path / "graph")
    path = make_custom_adapter(model, tmp_path / "adapter", case.settings)
    base, expected = custom.base(), custom.expected(path)
    assert np.abs(expected - base).max() > 0.01
    for mode, words in case.refused.items():
        with pytest.raises(lora_edge.AdapterError, match=words) as caught:
            _run(custom, path, mode)
        assert caught.value.hint
    if "merged" not in case.refused:
        error, effect = error_and_effect(custom.merged(load(path)), expected, base)
        assert error <= LIMIT * max(effect, 1)
    if "switchable" in case.refused:
        return
    graph = custom.switchable({"a": custom.changes(load(path))})
    feeds = graph.tensors("a")
    error, effect = error_and_effect(graph.run(feeds), expected, base)
    assert error <= LIMIT * max(effect, 1)

    carriers = set()
    for key in feeds:
        parsed = parse_lora_input(key)
        if parsed is not None and parsed.part == case.feature and case.path in ("", parsed.path):
            carriers.add(key)
    assert carriers
    dropped = {key: array * (key not in carriers) for key, array in feeds.items()}
    error, _ = error_and_effect(graph.run(dropped), expected, base)
    assert error > 1000 * LIMIT


def _run(custom: Custom, path: Path, mode: str) -> None:
    adapter = load(path)
    if mode == "merged":
        custom.merged(adapter)
    else:
        custom.switchable({"a": custom.changes(adapter)})


def test_the_page_has_the_counts() -> None:
    page = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    told = " ".join(page.split())
    for line in summary():
        assert line in told, line
