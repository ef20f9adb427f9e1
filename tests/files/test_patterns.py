"""Regular expressions of files: as re has them, and within a limit of time."""

from __future__ import annotations

import re
import time

import pytest

from lora_edge.errors import AdapterError
from lora_edge.files import patterns
from lora_edge.files.patterns import (
    MATCH_SECONDS,
    PATTERN_SECONDS,
    check_time_of_re,
    matched,
)

PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "h.3.attn.c_attn",
    "lm_head",
    "encoder.layer.1.attention.self.query\n",
    "",
]
ALIKE = [
    ".*",
    r"(.*\.)?(q_proj)$",
    r"(.*\.)?(model.layers.0.self_attn.q_proj)$",
    r"model\.layers\.(\d+)\..*(q|k|v|o)_proj",
    r".*layers\.(?:[0-9]|1[01])\.mlp.*",
    r"^(?!.*lm_head).*proj$",
    r"(?i)MODEL.*",
    r"[^.]+",
    r"h\.\d{1,2}\.attn\.c_attn",
    r"(a||q).*",
    r"\w+\Z",
    r".*query$",
    r"(?P<x>l)m_head",
    r"[a-z_]+?(?=\.)",
    r"x{,3}.*",
]


def _match(pattern: str, text: str, how: str = "match") -> bool:
    return matched(pattern, text, how, "it has the key", AdapterError, "Correct it.") is not None  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", ALIKE)
def test_matches_what_re_matches(pattern: str) -> None:
    for text in PATHS:
        assert _match(pattern, text) == bool(re.match(pattern, text))
        assert _match(pattern, text, "fullmatch") == bool(re.fullmatch(pattern, text))


@pytest.mark.parametrize(
    "pattern",
    ["(", "[a", "*", "(?P<a>x)(?P<a>y)", r"\p{L}", "(" * 5000 + ")" * 5000, "a" * 20_000,
     "(?:proj){e<=2}", "[[:alpha:]]+", "[[a-z]--[x]]", "(?V1)x", "a{1,4294967296}",
     "(?<=a+)b"],
)  # fmt: skip
def test_what_re_does_not_have_is_refused(pattern: str) -> None:
    with pytest.raises(AdapterError, match=r"it has the key .*, which is not a regular") as caught:
        _match(pattern, "q_proj")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "pattern", [r"(.*\.)?((a+)+$)$", r"(([a-z._0-9])+.)+([A-Z])+$", r"(.*)*(.*)*(.*)*!", "(x+x+)+y"]
)
def test_patterns_that_keep_re_busy_for_ever_are_quick(pattern: str) -> None:
    started = time.thread_time()
    for index in range(20):
        assert not _match(pattern, f"model.layers.{index}." + "a" * 40 + "x" * 40 + ".")
    assert time.thread_time() - started < PATTERN_SECONDS + 2 * MATCH_SECONDS


def test_a_pattern_that_keeps_any_engine_busy_is_refused_in_time() -> None:
    started = time.thread_time()
    for index in range(20):
        with pytest.raises(AdapterError, match="takes too long to match"):
            _match("(.*\\.)?((a|aa)+)$", f"model.layers.{index}." + "a" * 60 + "!")
    assert time.thread_time() - started < PATTERN_SECONDS + 4 * MATCH_SECONDS


def _check(*patterns: str) -> None:
    check_time_of_re(patterns, PATHS, "it has the key", AdapterError, "Correct it.")


def test_what_keeps_re_itself_busy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "RE_SECONDS", 3.0)
    paths = ["model." + "a" * 40 + "."]
    with pytest.raises(
        AdapterError, match=r"key '\(x\+x\+\)\+y\|\.\*\(a\+\)\+\$', which takes too"
    ):
        check_time_of_re(
            ["(.*\\.)?q_proj", "(", r"(x+x+)+y|.*(a+)+$"],
            paths,
            "it has the key",
            AdapterError,
            "h",
        )


def test_what_re_is_done_with_is_taken() -> None:
    _check(*ALIKE, "(", *(rf"(.*\.)?({x})$" for x in ALIKE))


def test_plain_patterns_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "sys", None)
    _check("q_proj", r".*q_proj", r"layers\.\d+")


def test_quick_matches_do_not_use_the_time_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _match(r"(.*\.)?(never_slow)$", "a.never_slow")
    monkeypatch.setattr(patterns, "PATTERN_SECONDS", 0.0)
    for _ in range(1000):
        assert _match(r"(.*\.)?(never_slow)$", "a.never_slow")
