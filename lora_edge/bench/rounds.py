"""Rounds: fresh processes of every contestant, made in shuffled order, that take shuffled turns.

The machine's speed drifts, and every session has a bias of its own. So the contestants take turns
within each figure, in an order that is shuffled for each turn; each round has new processes; and
the reference is entered twice.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any, get_args

from lora_edge.bench.plan import Entry, Figure, Memory, Plan, Settings, Taker
from lora_edge.clients.process import Process
from lora_edge.errors import ParityError

Costs = Mapping[str, Mapping[str, float]]
"""Figure -> taker -> seconds or bytes, the median of one round."""

_PAUSE = 0.05  # seconds: the last one's threads must have stopped spinning; 5 ms is too short
_WARM_UP = 2  # turns
_PREFILLS = 5  # turns at most; the first is not counted
_DIFFERENCE = 0.01  # of the adapter's effect, or of the logits
_LOG_PROBABILITY = 0.01  # of the first token


def order_of(items: Sequence[Any], generator: random.Random) -> list[Any]:
    """The items in a new order."""
    shuffled = list(items)
    generator.shuffle(shuffled)
    return shuffled


def run_round(
    plan: Plan,
    settings: Settings,
    index: int,
    begin: Callable[[Entry], Process] | None = None,
) -> Costs:
    """One round: new processes, every figure once.

    Args:
        plan: what is measured.
        settings: how.
        index: of the round; with the seed it decides tokens and orders.
        begin: makes an entry's process.

    Raises:
        ProcessError: one cannot do what the plan says, or has died.
        ParityError: contestants that should compute the same do not.
    """
    made = begin or (lambda x: Process(x.key, x.command, single=settings.threads == 1))
    return _Round(plan, settings, index).run(made)


class _Round:
    def __init__(self, plan: Plan, settings: Settings, index: int) -> None:
        self._plan = plan
        self._settings = settings
        self._random = random.Random(f"{settings.seed} {index}")
        self._processes: dict[str, Process] = {}
        self._opened: dict[str, Mapping[str, Any]] = {}
        self._memory: dict[str, Mapping[str, Any]] = {}

    def run(self, begin: Callable[[Entry], Process]) -> Costs:
        used = {taker.entry for figure in self._plan.figures for taker in figure.takers}
        self._measure_memory(begin)
        with ExitStack() as stack:
            for entry in order_of([x for x in self._plan.entries if x.key in used], self._random):
                process = stack.enter_context(begin(entry))
                self._processes[entry.key] = process
                given = {**entry.given, "threads": self._settings.threads}
                self._opened[entry.key] = process.ask("open", player=entry.player, given=given)
            return {figure.name: self._figure(figure) for figure in self._plan.figures}

    def _measure_memory(self, begin: Callable[[Entry], Process]) -> None:
        """Of each process while it is the only one: pages that several map would be shared."""
        wanted = {
            taker.entry: (figure, taker)
            for figure in self._plan.figures
            for taker in figure.takers
            if taker.work in get_args(Memory)
        }
        entries = [x for x in self._plan.entries if x.key in wanted]
        for entry in order_of(entries, self._random):
            figure, taker = wanted[entry.key]
            prompt = self._tokens(len(taker.adapters), figure.tokens)
            with begin(entry) as process:
                given = {**entry.given, "threads": self._settings.threads}
                process.ask("open", player=entry.player, given=given)
                process.ask("start", **self._batch(taker, figure, prompt, 1))
                self._memory[entry.key] = process.ask("memory")

    def _figure(self, figure: Figure) -> dict[str, float]:
        if any(taker.work in ("decode", "switch") for taker in figure.takers):
            return self._turns(figure)
        if figure.takers[0].work == "prefill":
            return self._prefills(figure)
        return {x.name: self._once(x, figure) for x in order_of(figure.takers, self._random)}

    def _once(self, taker: Taker, figure: Figure) -> float:
        """A cost that a process has once."""
        if taker.work == "files":
            return float(taker.bytes)
        if taker.work == "open":
            return float(self._opened[taker.entry]["cpu"])
        process = self._processes[taker.entry]
        if taker.work == "load":
            return float(process.ask("load", adapter=taker.adapters[0])["cpu"])
        if taker.work == "start":
            prompt = self._tokens(1, figure.tokens)
            first = process.ask("start", **self._batch(taker, figure, prompt, 1))
            return float(self._opened[taker.entry]["since"]) + float(first["seconds"])
        return float(self._memory[taker.entry].get(taker.work, 0))

    def _tokens(self, rows: int, count: int) -> list[list[int]]:
        return [
            [self._random.randrange(self._plan.vocabulary) for _ in range(count)]
            for _ in range(rows)
        ]

    def _batch(
        self, taker: Taker, figure: Figure, rows: list[list[int]], room: int
    ) -> dict[str, Any]:
        return {
            "key": f"{figure.name} {taker.name}",
            "rows": rows,
            "adapters": list(taker.adapters),
            "room": figure.tokens + room,
            "together": taker.together,
        }

    def _clocked(self, answer: Mapping[str, Any]) -> float:
        return float(answer["cpu" if self._settings.clock == "cpu" else "seconds"])

    def _most_rows(self, figure: Figure) -> int:
        return max(len(taker.adapters) for taker in figure.takers if taker.work != "switch")

    def _prefills(self, figure: Figure) -> dict[str, float]:
        prompt = self._tokens(self._most_rows(figure), figure.tokens)
        found: dict[str, list[float]] = {taker.name: [] for taker in figure.takers}
        turns = min(_PREFILLS, self._settings.steps)
        for turn in range(turns + 1):
            for taker in order_of(figure.takers, self._random):
                time.sleep(_PAUSE)
                given = self._batch(taker, figure, prompt[: len(taker.adapters)], 1)
                answer = self._processes[taker.entry].ask("start", **given)
                if turn:
                    found[taker.name].append(self._clocked(answer))
        self._check(figure)
        return {name: median(seconds) for name, seconds in found.items()}

    def _turns(self, figure: Figure) -> dict[str, float]:
        """Tokens, and switches to other adapters; a turn is two tokens, the second is measured."""
        count, most = self._settings.steps + _WARM_UP, self._most_rows(figure)
        prompt = self._tokens(most, figure.tokens)
        room = 2 * count
        for taker in order_of(figure.takers, self._random):
            if taker.work == "decode":
                given = self._batch(taker, figure, prompt[: len(taker.adapters)], room)
                self._processes[taker.entry].ask("start", **given)
        self._check(figure)
        found: dict[str, list[float]] = {taker.name: [] for taker in figure.takers}
        for turn in range(count):
            tokens = [[row[0] for row in self._tokens(most, 1)] for _ in range(2)]
            for taker in order_of(figure.takers, self._random):
                time.sleep(_PAUSE)
                answer = self._turn(taker, figure, tokens, turn, figure.tokens + room)
                if turn >= _WARM_UP:
                    found[taker.name].append(self._clocked(answer))
        return {name: median(seconds) for name, seconds in found.items()}

    def _turn(
        self, taker: Taker, figure: Figure, tokens: list[list[int]], turn: int, room: int
    ) -> Mapping[str, Any]:
        process = self._processes[taker.entry]
        if taker.work == "switch":
            # The other one first, which is not measured.
            names = taker.adapters
            process.ask("switch", adapters=[names[(turn + 1) % len(names)]], room=room)
            return process.ask("switch", adapters=[names[turn % len(names)]], room=room)
        own = [row[: len(taker.adapters)] for row in tokens]
        key = f"{figure.name} {taker.name}"
        return process.ask("steps", key=key, tokens=own, together=taker.together)

    def _check(self, figure: Figure) -> None:
        """Those that should compute the same do.

        Raises:
            ParityError: two of them differ.
        """
        logits: dict[str, dict[str, list[float]]] = {}
        firsts: dict[str, dict[str, tuple[int, float]]] = {}
        for taker in figure.takers:
            if taker.computes and taker.work in ("decode", "prefill"):
                key = f"{figure.name} {taker.name}"
                asked = self._processes[taker.entry].ask("logits", key=key, together=taker.together)
                token, probability = asked["first"]
                group = firsts.setdefault(taker.computes, {})
                group[taker.name] = token, probability
                if asked["logits"]:
                    logits.setdefault(taker.computes, {})[taker.name] = asked["logits"]
        check_alike(logits)
        # Logits tell more: between two that have them, a tie for the first token means nothing.
        check_firsts(
            {
                computes: {
                    name: first
                    for place, (name, first) in enumerate(group.items())
                    if place == 0 or name not in logits.get(computes, {})
                }
                for computes, group in firsts.items()
            }
        )


def check_alike(logits: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Contestants of one group have the same logits, but for rounding.

    Args:
        logits: what is computed -> contestant -> logits of the same prompt.

    Raises:
        ParityError: two differ by more than a hundredth of what tells the groups apart (of the
            largest logit where there is one group).
    """
    firsts = [next(iter(group.values())) for group in logits.values() if group]
    if not firsts:
        return
    apart = [_apart(firsts[0], other) for other in firsts[1:]]
    allowed = _DIFFERENCE * (min(apart) if apart else max(map(abs, firsts[0])))
    for group in logits.values():
        (first, expected), *others = group.items()
        for name, values in others:
            error = _apart(values, expected)
            if not error <= allowed:
                raise ParityError(
                    f"{name} and {first} differ by {error:.2g} in a logit, allowed is "
                    f"{allowed:.2g}: they do not run the same model",
                    "Compare bundles and files that were made from the same base and adapter.",
                )


def check_firsts(firsts: Mapping[str, Mapping[str, tuple[int, float]]]) -> None:
    """Contestants of one group choose the same first token, as likely.

    Args:
        firsts: what is computed -> contestant -> the likeliest token after the same prompt, and its
            log-probability.

    Raises:
        ParityError: two choose another, or their log-probabilities differ by more than 0.01.
    """
    for group in firsts.values():
        (first, expected), *others = group.items()
        for name, found in others:
            if found[0] != expected[0] or not abs(found[1] - expected[1]) <= _LOG_PROBABILITY:
                raise ParityError(
                    f"{name} chooses token {found[0]} (log-probability {found[1]:.4f}), {first} "
                    f"{expected[0]} ({expected[1]:.4f}): they do not run the same model",
                    "Compare bundles and files that were made from the same base and adapter.",
                )


def _apart(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
