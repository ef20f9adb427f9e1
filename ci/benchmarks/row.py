"""A row of the table, and what the plans behind rows are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lora_edge.bench.plan import AGAIN, Entry, Figure, Plan, Taker
from lora_edge.bundle.bundle import Bundle

OFF, ON = "off", "on"

Kind = Literal["ratio", "difference", "value"]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: for ``--rows``.
        text: what it is.
        bench: name of its bench.
        precisions: of the bundle.
        figure: of the bench.
        own: the taker that is looked at.
        other: what it is compared with; empty: the figure's reference.
        targets: shape and precision, or precision -> what is to be reached, 0 is nothing; ``""``
            is any other.
        least: at least the target; else at most.
        kind: a ratio; or a difference, or the value itself, in the figure's unit.
        limit: it has a limit by bytes: how fast it can be if bytes alone count.
        beside: two takers; the ratio of own to other is divided by that of the first to the second.
    """

    name: str
    text: str
    bench: str
    precisions: tuple[str, ...]
    figure: str
    own: str
    other: str
    targets: dict[str, float]
    least: bool = True
    kind: Kind = "ratio"
    limit: bool = False
    beside: tuple[str, ...] = ()


class LackingError(Exception):
    """A bench that cannot be run here; the message says why."""


def plan_of(bundle: Bundle, entries: Sequence[Entry], figures: Sequence[Figure]) -> Plan:
    """What a bench measures of a bundle."""
    return Plan(entries, figures, bundle.manifest.parts["decoder"].vocab_size)


def decoding(takers: Sequence[Taker]) -> Figure:
    """New tokens, one row."""
    return Figure("decode", "decoding after a prompt of 128", "tokens/s", tuple(takers))


def twice(key: str, player: str, given: dict[str, object]) -> list[Entry]:
    """The reference's processes."""
    return [Entry(key, player, given), Entry(key + AGAIN, player, given)]
