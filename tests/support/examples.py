"""Which rows of a table ci/test runs; ci/long runs the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def examples(rows: Iterable[Any], now: Callable[[Any], bool] | Iterable[Any]) -> list[Any]:
    """Rows for ``parametrize``, of which those that are not wanted now are marked ``long``.

    Args:
        rows: names, or tuples of arguments.
        now: which of them ci/test runs: they, or whether a row is one.
    """
    rows = list(rows)
    chosen = [row for row in rows if now(row)] if callable(now) else list(now)
    assert chosen
    assert all(row in rows for row in chosen)
    return [
        row
        if row in chosen
        else pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=pytest.mark.long)
        for row in rows
    ]
