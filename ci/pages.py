"""Pages of the documentation that programs write a part of."""

from __future__ import annotations


def written(text: str, made: str, begin: str, end: str) -> str:
    """``text`` with what was made between its two comments."""
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}\n\n{made}\n\n{end}{tail}"
