"""stdout and stderr whose readers may go before the work is done: ``lora-edge validate … | head``.

Knows streams; knows nothing of commands.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


@contextlib.contextmanager
def unheard(*, stdout: bool = True) -> Iterator[None]:
    """In the block, what nobody reads any more is dropped, and the work goes on to its verdict.

    Args:
        stdout: for stdout too; else a ``BrokenPipeError`` of it is raised, as Python does.
    """
    names = ["stderr", "stdout"] if stdout else ["stderr"]
    # A stream that was closed from the start is None.
    before: dict[str, TextIO] = {x: getattr(sys, x) for x in names if getattr(sys, x) is not None}
    inside = {name: _Unheard(stream) for name, stream in before.items()}
    try:
        for name, stream in inside.items():
            setattr(sys, name, stream)
        yield
    finally:
        for name, stream in inside.items():
            setattr(sys, name, before[name])
            stream.flush()


class _Unheard:
    """A text stream that goes to nowhere once its reader has gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
