"""One contestant's process: ``python -m lora_edge.bench.child``, one order a line, one answer each.

An answer is ``{"seconds": …, "cpu": …}`` with what was asked for, or ``{"error": …, "hint": …}``.
Seconds are those that passed, cpu those that all threads of this process ran.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from lora_edge.bench.memory import memory
from lora_edge.bench.players import make
from lora_edge.bench.players.player import Player
from lora_edge.errors import LoraEdgeError, MissingDependencyError

Answer = dict[str, Any]
_BEGUN = time.perf_counter()
LOGITS = 256  # of the vocabulary, spread evenly: enough to tell one model from another


def timed(work: Callable[[], object]) -> Answer:
    """Seconds and CPU seconds of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


class Child:
    """The player, and what it can be told to do."""

    def __init__(self) -> None:
        self._player: Player | None = None

    @property
    def player(self) -> Player:
        """The one that was opened.

        Raises:
            RuntimeError: none was.
        """
        if self._player is None:
            raise RuntimeError("nothing is open")
        return self._player

    def serve(self, order: Mapping[str, Any]) -> Answer:
        """Do what an order says; whatever the player raises is raised."""
        todo: dict[str, Callable[[Mapping[str, Any]], Answer]] = {
            "open": self._open,
            "start": self._start,
            "steps": self._steps,
            "load": lambda x: timed(lambda: self.player.load(x["adapter"])),
            "switch": self._switch,
            "logits": self._sample,
            "memory": lambda _: dict(memory()),
        }
        return todo[order["do"]](order)

    def _open(self, order: Mapping[str, Any]) -> Answer:
        player = make(order["player"], order["given"])
        try:
            imported = timed(player.imports)
        except ImportError as error:
            raise MissingDependencyError(
                f"{player.package} is not installed; pip install {player.package}",
                f"Python said: {error}",
            ) from error
        opened = timed(player.open)
        self._player = player
        since = time.perf_counter() - _BEGUN
        about = {"about": player.about()}
        return {**opened, **about, "imports": imported["seconds"], "since": since}

    def _start(self, order: Mapping[str, Any]) -> Answer:
        """Prompts, as one batch or each as one of its own; those of a key before are dropped."""
        rows, adapters, room = order["rows"], order["adapters"], order["room"]
        parts = _parts(order["key"], rows, order["together"])
        for key, _ in parts:
            self.player.drop(key)

        def work() -> None:
            for key, span in parts:
                self.player.start(key, rows[span], adapters[span], room)

        return timed(work)

    def _steps(self, order: Mapping[str, Any]) -> Answer:
        """One token for each row, several times; the last time is measured, others wake threads."""
        parts = _parts(order["key"], order["tokens"][0], order["together"])

        def work(tokens: list[int]) -> None:
            for key, span in parts:
                self.player.step(key, tokens[span])

        for tokens in order["tokens"][:-1]:
            work(tokens)
        return timed(lambda: work(order["tokens"][-1]))

    def _switch(self, order: Mapping[str, Any]) -> Answer:
        self.player.drop("switch")
        return timed(lambda: self.player.switch(order["adapters"], order["room"]))

    def _sample(self, order: Mapping[str, Any]) -> Answer:
        """The likeliest token with its log-probability, and logits of whom tells them."""
        ((key, _), *_) = _parts(order["key"], [0], order["together"])
        answer: Answer = {"first": self.player.first(key), "logits": []}
        values = self.player.logits(key)
        if values is not None:
            step = max(1, len(values) // LOGITS)
            answer["logits"] = [float(value) for value in values[::step][:LOGITS]]
        return answer


def _parts(key: str, rows: list[Any], together: bool) -> list[tuple[str, slice]]:
    """The batches of a key, and which rows each has."""
    if together:
        return [(key, slice(None))]
    return [(f"{key} {index}", slice(index, index + 1)) for index in range(len(rows))]


def main() -> None:
    """Answer orders until there are no more."""
    # Libraries print to stdout: it is stderr for them.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    child = Child()
    for line in sys.stdin:
        try:
            answer = child.serve(json.loads(line))
        except LoraEdgeError as error:
            answer = {"error": str(error), "hint": error.hint}
        except Exception as error:  # noqa: BLE001  the parent raises it
            answer = {"error": f"{type(error).__name__}: {error}", "hint": ""}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
