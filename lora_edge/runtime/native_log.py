"""What native libraries write to stderr while a session is made: there ONNX Runtime says why."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_ENTRY = re.compile(r"\[([EFW]):onnxruntime:[^\]]*\]\s*(.+)")
_STATUS = re.compile(r"^.*\[ONNXRuntimeError\] : \d+ : \w+ : ")


@dataclass
class NativeLog:
    """Text that was written to the process's stderr."""

    text: str = ""

    def errors(self) -> list[str]:
        """ONNX Runtime's own entries of severity error, without where they come from."""
        return self._entries("EF")

    def warnings(self) -> list[str]:
        """The same of its warnings."""
        return self._entries("W")

    def _entries(self, severities: str) -> list[str]:
        entries = _ENTRY.findall(_COLOURS.sub("", self.text))
        found = [without_status(text) for kind, text in entries if kind in severities]
        return list(dict.fromkeys(found))


def without_status(text: str) -> str:
    """A message of ONNX Runtime without the codes and source lines in front of it."""
    return _STATUS.sub("", text).strip()


@contextlib.contextmanager
def captured() -> Iterator[NativeLog]:
    """Keep what the process writes to its stderr within; the caller may print it afterwards.

    The whole process's: what other threads write meanwhile is kept too.
    """
    import tempfile  # with all that it imports, it takes milliseconds

    log = NativeLog()
    try:
        before = os.dup(2)
    except OSError:  # there is no stderr, as in a windowed program
        yield log
        return
    with tempfile.TemporaryFile() as file:
        if sys.stderr is not None:
            sys.stderr.flush()
        os.dup2(file.fileno(), 2)
        try:
            yield log
        finally:
            if sys.stderr is not None:
                sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            log.text = file.read().decode("utf-8", "replace")


def release(log: NativeLog) -> None:
    """Write to stderr what was kept."""
    if log.text:
        with contextlib.suppress(OSError):
            os.write(2, log.text.encode("utf-8", "replace"))
