"""What is measured: processes, and the figures in which they take turns.

Plain data; knows nothing of how it is run.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Memory = Literal["pss", "private", "peak"]
Work = Literal["decode", "prefill", "switch", "load", "open", "start", "files", Memory]
DECODE: Work = "decode"
AGAIN = " again"


@dataclass(frozen=True)
class Entry:
    """A contestant's process.

    Attributes:
        key: its name in the plan.
        player: a name of :data:`lora_edge.bench.players.PLAYERS`.
        given: what the player is given, but for the threads.
        python: the interpreter; empty: this one.
    """

    key: str
    player: str
    given: Mapping[str, Any]
    python: str = ""

    @property
    def command(self) -> list[str]:
        """What starts it."""
        return [self.python or sys.executable, "-m", "lora_edge.bench.child"]


@dataclass(frozen=True)
class Taker:
    """Who takes turns in a figure.

    Attributes:
        name: in the table.
        entry: key of its process.
        work: what it does there.
        adapters: of each row; of a load, a switch: the adapters in question.
        together: the rows are one batch; else each is one of its own, and they run in turn.
        computes: takers with the same word have the same logits, which is checked; empty: not.
        bytes: of files, what it has.
    """

    name: str
    entry: str
    work: Work
    adapters: tuple[str | None, ...] = (None,)
    together: bool = True
    computes: str = ""
    bytes: int = 0


@dataclass(frozen=True)
class Figure:
    """One comparison.

    Attributes:
        name: a short name for options and JSON.
        title: for people.
        unit: of the value of each taker.
        takers: the reference first, and it again second, but where files are counted.
        tokens: of each row's prompt, before or during what is measured.
        scale: a rate is this over the seconds; a cost is the seconds (or bytes) times this.
        rate: it is a rate, and more is better; else a cost, and less is.
    """

    name: str
    title: str
    unit: str
    takers: tuple[Taker, ...]
    tokens: int = 128
    scale: float = 1.0
    rate: bool = True

    @property
    def counted(self) -> bool:
        """Its values are counted, and the same each time; the reference is entered once."""
        return self.takers[0].work == "files"


@dataclass(frozen=True)
class Plan:
    """Everything that is measured.

    Attributes:
        entries: the processes.
        figures: in the order in which they are measured.
        left_out: who does not take part, and why, in a line each.
        runs: entry -> what runs there, as it says itself when it is tried.
        vocabulary: token ids are below it.
    """

    entries: Sequence[Entry]
    figures: Sequence[Figure]
    vocabulary: int
    left_out: Mapping[str, str] = field(default_factory=dict)
    runs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """How it is measured.

    Attributes:
        processes: fresh processes of each contestant.
        steps: turns of each taker in each of them.
        threads: of each contestant.
        clock: ``wall``, or ``cpu``: the seconds that all threads ran, for one thread on a machine
            that others use too.
        seed: of the tokens and the order.
    """

    processes: int = 5
    steps: int = 16
    threads: int = 1
    clock: Literal["wall", "cpu"] = "wall"
    seed: int = 0
