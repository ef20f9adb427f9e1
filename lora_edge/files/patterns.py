"""Regular expressions that a file brings: what ``re`` makes of them, within a limit of time.

``re`` can be kept busy for ever by a short pattern, and cannot be stopped; the ``regex`` package,
which matches alike, can. Where the two differ, the pattern is refused.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import regex

from lora_edge.errors import LoraEdgeError

MAX_LENGTH = 10_000
"""Longest pattern, in characters."""
MATCH_SECONDS = 0.5
"""Longest time of one match, of the processor."""
PATTERN_SECONDS = 2.0
"""Longest time of all slow matches of one pattern."""

RE_SECONDS = 10.0
"""Longest time of all patterns of a config in a process of its own, its start included."""

_SLOW = 0.02  # seconds; a match of a module path takes microseconds
# Fuzzy matching, POSIX classes and sets of sets, which re does not have.
_OTHERWISE = re.compile(r"\{[^}]*[a-zA-Z<>=][^}]*\}|\[\[|\[:")


class _Pattern:
    def __init__(self, text: str) -> None:
        """Compile a pattern; raises ValueError."""
        if len(text) > MAX_LENGTH:
            raise ValueError(f"it has {len(text)} characters")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                re.compile(text)
                if _OTHERWISE.search(text):
                    raise ValueError("it holds a nested set or braces around letters")
                self._compiled: Any = regex.compile(text, regex.VERSION0)
        except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise ValueError(str(error) or type(error).__name__) from error
        self._spent = 0.0

    def found(self, text: str, how: Literal["match", "fullmatch"]) -> Any:
        """The match object or None; raises TimeoutError."""
        if self._spent > PATTERN_SECONDS:
            raise TimeoutError
        started = time.thread_time()
        try:
            return getattr(self._compiled, how)(text, timeout=MATCH_SECONDS)
        finally:
            taken = time.thread_time() - started
            if taken > _SLOW:
                self._spent += taken


@functools.lru_cache(maxsize=512)
def _compiled(pattern: str) -> _Pattern | str:
    """A pattern, or what is wrong with it."""
    try:
        return _Pattern(pattern)
    except ValueError as error:
        return str(error)


def matched(
    pattern: str,
    text: str,
    how: Literal["match", "fullmatch"],
    what: str,
    error: type[LoraEdgeError],
    hint: str,
) -> Any:
    """What ``re.match`` or ``re.fullmatch`` of a pattern of a file gives: a match object or None.

    Args:
        pattern: the regular expression.
        text: what it is matched with.
        how: from the beginning, or as a whole.
        what: what the pattern is called in an error: ``rank_pattern has the key``.
        error: what is raised where it is refused.
        hint: of that error: what to do.

    Raises:
        LoraEdgeError: of type ``error``: it is no regular expression of ``re``, or takes too long.
    """
    shown = repr(pattern if len(pattern) <= 80 else f"{pattern[:77]}...")
    compiled = _compiled(pattern)
    if isinstance(compiled, str):
        raise error(f"{what} {shown}, which is not a regular expression: {compiled}", hint)
    try:
        return compiled.found(text, how)
    except TimeoutError:
        raise error(f"{what} {shown}, which takes too long to match {text!r}", hint) from None


def check_time_of_re(
    patterns: Sequence[str],
    texts: Sequence[str],
    what: str,
    error: type[LoraEdgeError],
    hint: str,
) -> None:
    """Check that Python's own ``re`` is done with patterns in time, before a library matches them.

    A process of its own tries, because ``re`` cannot be stopped; none is started for patterns
    without two signs that repeat.

    Args:
        patterns: regular expressions.
        texts: what they will be matched with.
        what, error, hint: as of :func:`matched`.

    Raises:
        LoraEdgeError: of type ``error``: one takes too long.
    """
    risky = [pattern for pattern in patterns if len(_REPEATS.findall(pattern)) > 1]
    if not risky:
        return
    asked = json.dumps([risky, list(texts)])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _TRY],
            input=asked,
            capture_output=True,
            text=True,
            timeout=RE_SECONDS,
            check=False,
        ).stdout
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
        done = said.decode() if isinstance(said, bytes) else said
    count = len(done.split())
    if count < len(risky):
        shown = repr(risky[count][:80])
        raise error(f"{what} {shown}, which takes too long to match with Python's re", hint)


_REPEATS = re.compile(r"[*+{]")
_TRY = """
import json, re, sys
patterns, texts = json.load(sys.stdin)
for pattern in patterns:
    try:
        compiled = re.compile(pattern)
        for text in texts:
            compiled.match(text), compiled.fullmatch(text)
    except Exception:
        pass  # whoever uses it will say what is wrong
    print("done", flush=True)
"""
