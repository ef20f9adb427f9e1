"""A process that takes orders, one JSON line each: it is started, asked, and ended."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from lora_edge.errors import LoraEdgeError

_TAIL = 400  # characters of what a process that died had said


class ProcessError(LoraEdgeError):
    """A process that cannot do what it was told, or has died."""


class Process:
    """One process; a context manager that ends it.

    Args:
        name: what it is, for errors.
        command: the program and its arguments.
        single: limit libraries that count threads by OpenMP to one as well.

    Raises:
        ProcessError: it cannot be started.
    """

    def __init__(self, name: str, command: Sequence[str], *, single: bool = False) -> None:
        self._name = name
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
        environment.pop("OMP_NUM_THREADS", None)
        if single:
            environment["OMP_NUM_THREADS"] = "1"
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                env=environment,
            )
        except OSError as error:
            self._said.close()
            raise ProcessError(
                f"{name}: {command[0]} cannot be started: {error.strerror}",
                "Give a program that is there.",
            ) from error

    def ask(self, do: str, **more: Any) -> Mapping[str, Any]:
        """Give an order and wait for its answer.

        Raises:
            ProcessError: it cannot do that, or has died.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **more}).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            raise ProcessError(
                f"{self._name}: its process died: {self._tail()}", "Run it alone to see why."
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            hint = answer.get("hint") or "See whether it takes this bundle, and is installed whole."
            raise ProcessError(f"{self._name}: {answer['error']}", hint)
        return answer

    def _tail(self) -> str:
        code = self._process.wait()
        self._said.seek(0)
        text = self._said.read().decode("utf-8", "replace").strip()
        return f"exit code {code}; {' '.join(text[-_TAIL:].split()) or 'it said nothing'}"

    def close(self) -> None:
        """End it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # it died with an order unread
                    continue
        self._process.kill()
        self._process.wait()
        self._said.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
