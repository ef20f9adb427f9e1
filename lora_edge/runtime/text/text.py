"""Tokens to text while they come: whole characters, and nothing that a stop may take back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
"""``role`` and ``content``, and what else a template reads: ``tool_calls``, ``name``, ..."""

_INCOMPLETE = "\ufffd"


class TextStream:
    """Turns one row's tokens into pieces of text whose concatenation is the row's completion.

    Args:
        decode: token ids -> text.
        stop: the text ends before the first of these strings that appears in it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = [text for text in stop if text]
        self._ids: list[int] = []
        self._start = 0  # tokens before it serve no more as context
        self._read = 0  # tokens before it have been turned into text
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain, often empty."""
        self._ids.append(token)
        text = self._new_text()
        if text.endswith(_INCOMPLETE):  # a character whose bytes are still to come
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._release(text, final=False)

    def close(self) -> str:
        """No more tokens: the rest of the text."""
        return self._release(self._new_text(), final=True)

    def _new_text(self) -> str:
        # Decoded after the tokens before them, because a first token may lose its leading space.
        before = self._decode(self._ids[self._start : self._read])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _release(self, text: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = 0 if final else self._overlap()
        cut = len(self._held) - keep
        piece, self._held = self._held[:cut], self._held[cut:]
        return piece

    def _overlap(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = max((len(text) for text in self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(text.startswith(self._held[-size:]) for text in self._stop):
                return size
        return 0
