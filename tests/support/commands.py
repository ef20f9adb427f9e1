"""What a test of the command line gets, and the models that it uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from lora_edge.cli import main


@dataclass(frozen=True)
class Result:
    """What a command left: exit code and both streams."""

    code: int
    out: str
    err: str


Cli = Callable[..., Result]


def exit_code(arguments: list[str]) -> int:
    """Of a command that runs in this process."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0)
