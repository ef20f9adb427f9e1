"""Readers that do harm, one of each sort: the fuzzer has to find each of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from lora_edge.errors import DataError, LoraEdgeError


def _raise(_: Path) -> None:
    raise ValueError("no")


def _say_nothing(_: Path) -> None:
    raise LoraEdgeError("no")


def _hang(_: Path) -> None:
    while True:
        pass


def _fill(_: Path) -> None:
    bytearray(3 << 30)


def _write(folder: Path) -> None:
    (folder.parent / "written").write_text("x")


def _die(_: Path) -> None:
    os.kill(os.getpid(), 11)


def _accept(_: Path) -> None:
    """What the oracle says is wrong."""


def _refuse(_: Path) -> None:
    raise DataError("no", "Do not.")


HARMS: dict[str, tuple[Callable[[Path], None], str]] = {
    "harm-raise": (_raise, "ValueError"),
    "harm-no-hint": (_say_nothing, "no hint"),
    "harm-hang": (_hang, "more than 5 s"),
    "harm-memory": (_fill, "more than 1 GB"),
    "harm-write": (_write, "touched what is outside"),
    "harm-die": (_die, "the process died"),
    "harm-accept": (_accept, "accepted though"),
    "harm-none": (_refuse, ""),
}
"""Name -> what is done with a mutant, and what the fuzzer says of it; empty: nothing is wrong."""


def of_mutants(harm: Callable[[Path], None]) -> Callable[[Path], None]:
    """The reader that does so to mutants, and takes what is whole."""

    def read(folder: Path) -> None:
        # What is whole is a link to the seed.
        if (folder / "prompts.txt").stat().st_nlink == 1:
            harm(folder)

    return read
