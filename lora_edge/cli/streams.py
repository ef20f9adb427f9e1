"""stdout and stderr whose readers may go before the work is done: ``lora-edge validate … | head``.

Knows streams; knows nothing of commands.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import click


@contextlib.contextmanager
def unheard(*, goes_on: bool = True) -> Iterator[None]:
    """In the block, what nobody reads any more is dropped, and the work goes on to its verdict.

    Click would end the process with exit code 1, which is "parity failed" here.

    Args:
        goes_on: also when stdout's reader has gone; else the command ends, with exit code 0.
    """
    # A stream that was closed from the start is None.
    names = [name for name in ("stderr", "stdout") if getattr(sys, name) is not None]
    before: dict[str, TextIO] = {name: getattr(sys, name) for name in names}
    inside = {
        # What was to be said on stderr is not worth the verdict, whatever is wrong with it.
        name: _Unheard(before[name], OSError)
        if name == "stderr"
        else _Unheard(before[name], BrokenPipeError, goes_on=goes_on)
        for name in names
    }
    try:
        for name, stream in inside.items():
            setattr(sys, name, stream)
        yield
    finally:
        for name, stream in inside.items():
            setattr(sys, name, before[name])
            try:
                stream.flush()
            except click.exceptions.Exit:
                pass
            except OSError:  # it failed in the block before, and would again when Python ends
                stream.to_nowhere()


class _Unheard:
    """A text stream that goes to nowhere once its reader has gone."""

    def __init__(self, stream: TextIO, gone: type[OSError], *, goes_on: bool = True) -> None:
        self._stream = stream
        self._gone = gone
        self._goes_on = goes_on

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except self._gone:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except self._gone:
            self._drop()

    def _drop(self) -> None:
        self.to_nowhere()
        if not self._goes_on:
            raise click.exceptions.Exit(0)

    def to_nowhere(self) -> None:
        """Drop what is buffered, and what will be written."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
