"""The one reader of jsonl: a JSON object in each line, and errors that name the file and the line.

They read ``FILE:LINE: what is wrong``. Knows nothing of what the objects mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_edge.errors import LoraEdgeError
from lora_edge.files.json import MAX_LINES_BYTES, parse_object, read_bytes

_MARK = b"\xef\xbb\xbf"  # of the byte order


@dataclass(frozen=True)
class Line:
    """A line that is not blank.

    Attributes:
        where: ``FILE:LINE``, for messages; the first line is 1.
        content: its bytes.
    """

    where: str
    content: bytes

    def object(
        self, error: type[LoraEdgeError], hint: str, *, nonfinite: bool = False
    ) -> dict[str, Any]:
        """What the line holds.

        Args:
            error: what is raised where it is refused.
            hint: of that error: what is expected.
            nonfinite: take ``NaN`` and ``Infinity``.

        Raises:
            LoraEdgeError: of type ``error``: the line is not UTF-8, or no JSON object within the
                limits of :mod:`lora_edge.files.json`.
        """
        what = f"{self.where}: the line"
        return parse_object(self.content, what, error, hint, nonfinite=nonfinite)


def read_jsonl(file: Path, error: type[LoraEdgeError], hint: str) -> list[Line]:
    """The lines of a file (or a pipe) that are not blank; each is parsed when it is asked to.

    Args:
        file: the file.
        error: what is raised where it is not read.
        hint: of that error: what to do.

    Raises:
        LoraEdgeError: of type ``error``: the file is missing or too long.
    """
    content = read_bytes(file, error, hint, max_bytes=MAX_LINES_BYTES, pipe=True)
    return list(split_lines(content, file))


def split_lines(content: bytes, file: Path) -> Iterator[Line]:
    """As :func:`read_jsonl`, of a file whose bytes were read already."""
    # Not splitlines(): JSON may hold other signs that end a line.
    for number, line in enumerate(content.removeprefix(_MARK).split(b"\n"), 1):
        if line.strip():
            yield Line(f"{file}:{number}", line)
