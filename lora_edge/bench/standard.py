"""The plan for a bundle: itself in all its ways of running, and beside others.

Knows bundles and names of figures; measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_edge.bench.memory import memory
from lora_edge.bench.plan import AGAIN, Entry, Figure, Memory, Plan, Taker, Work
from lora_edge.bench.rivals import Rival
from lora_edge.bundle.bundle import Bundle
from lora_edge.errors import DataError, OptionError
from lora_edge.names import NONE_ADAPTER

# In the order in which they are measured: an adapter is loaded before others use it.
FIGURES = {
    "start": "from the start of the process to the first token",
    "open": "opening, without imports",
    "decode": "new tokens after a prompt",
    "memory": "memory after a prompt, and at its peak",
    "prefill": "prompts of 128 and 1,024 tokens",
    "long": "new tokens after a long context",
    "load": "an adapter that is not loaded yet",
    "batch": "8 rows at once against one after another",
    "switch": "another adapter that is loaded already",
    "files": "sizes of files",
}
MEMORY_TITLES: dict[Memory, str] = {
    "pss": "memory after a prompt (PSS)",
    "private": "memory after a prompt that no file holds",
    "peak": "memory at its peak",
}
ROWS = 8
_PREFILLS = (128, 1024)
_MIB = 1 / (1 << 20)
OFF, PINNED = "off", "pinned"


@dataclass(frozen=True)
class Choices:
    """What is asked for.

    Attributes:
        adapter: the one that is on; empty: the first.
        figures: names of :data:`FIGURES`.
        tokens: of the prompt before decoding.
        long: tokens of the long context.
        steps: turns, each of two tokens.
    """

    adapter: str = ""
    figures: Sequence[str] = tuple(FIGURES)
    tokens: int = 128
    long: int = 2048
    steps: int = 16


def chosen_adapter(bundle: Bundle, name: str) -> str:
    """The adapter that is on.

    Args:
        bundle: the bundle.
        name: what is asked for; empty: the first.

    Returns:
        Its name; empty: the bundle has none. Of a merged bundle it is the one in the weights.

    Raises:
        AdapterNotFoundError: the bundle has no such adapter.
    """
    if name:
        return bundle.adapter(name).name
    return min(set(bundle.manifest.adapters) - {NONE_ADAPTER}, default="")


def standard_plan(bundle: Bundle, choices: Choices, rivals: Sequence[Rival]) -> Plan:
    """What is measured of a bundle.

    Args:
        bundle: it generates text.
        choices: what is asked for.
        rivals: who else takes part; those that cannot say why.

    Raises:
        AdapterNotFoundError: the bundle has no such adapter.
        DataError: the bundle has another task, or the model no room for the prompt.
        OptionError: no such figure.
    """
    manifest = bundle.manifest
    if set(manifest.parts) != {"decoder"}:
        raise DataError(
            f"bench measures bundles that generate text with a decoder; this one's task is "
            f"{manifest.task}",
            "Time Runner.classify() or Runner.embed() in Python.",
        )
    for name in choices.figures:
        if name not in FIGURES:
            raise OptionError(f"{name!r} is no figure", f"Figures are {', '.join(FIGURES)}.")
    return _Standard(bundle, choices, rivals).plan()


class _Standard:
    def __init__(self, bundle: Bundle, choices: Choices, rivals: Sequence[Rival]) -> None:
        self._bundle = bundle
        self._choices = choices
        self._switchable = bundle.manifest.mode == "switchable"
        names = sorted(set(bundle.manifest.adapters) - {NONE_ADAPTER})
        if choices.adapter and choices.adapter != NONE_ADAPTER:
            bundle.adapter(choices.adapter)
            names = [choices.adapter, *(x for x in names if x != choices.adapter)]
        self._names = names if self._switchable else []
        self._base = "base" if self._switchable else f"adapter {choices.adapter}"
        self._limit = bundle.manifest.parts["decoder"].max_length or 1 << 31
        self._left: dict[str, str] = {}
        self._rivals = []
        for rival in rivals:
            if rival.reason:
                self._left[rival.name] = rival.reason
            else:
                self._rivals.append(rival)

    def plan(self) -> Plan:
        room = 2 * (self._choices.steps + 2)
        if self._choices.tokens + room > self._limit:
            raise DataError(
                f"a prompt of {self._choices.tokens} tokens and {room} new ones do not fit in the "
                f"model's {self._limit} positions",
                "Lower --tokens or --steps.",
            )
        figures = [figure for name in FIGURES for figure in self._figures(name, room)]
        vocabulary = self._bundle.manifest.parts["decoder"].vocab_size
        return Plan(self._entries(), figures, vocabulary, self._left)

    def _entries(self) -> list[Entry]:
        given = {"bundle": str(self._bundle.directory)}
        found = [Entry(key, "bundle", given) for key in (OFF, OFF + AGAIN)]
        if self._names:
            found.append(Entry("on", "bundle", {**given, "first": self._names[0]}))
            found.append(Entry(PINNED, "bundle", {**given, "pinned": [self._names[0]]}))
        return [*found, *(entry for rival in self._rivals for entry in rival.entries)]

    def _figures(self, name: str, room: int) -> list[Figure]:
        if name not in self._choices.figures:
            return []
        tokens = self._choices.tokens
        if name == "decode":
            title = f"decoding, one row after a prompt of {tokens}"
            return [Figure(name, title, "tokens/s", self._tokens("decode"), tokens)]
        if name == "prefill":
            return [
                Figure(
                    f"prefill {count}",
                    f"prompt of {count:,} tokens",
                    "tokens/s",
                    self._tokens("prefill"),
                    count,
                    count,
                )
                for count in _PREFILLS
                if self._fits(f"prefill {count}", count + 1)
            ]
        if name == "long":
            count = min(self._choices.long, self._limit - room)
            if count <= tokens:
                self._left[name] = f"the model has no more than {self._limit} positions"
                return []
            title = f"decoding after a context of {count:,}"
            return [Figure(name, title, "tokens/s", self._tokens("decode"), count)]
        if name == "batch":
            return self._batch(tokens)
        if name == "switch":
            return self._switch(tokens)
        if name == "load":
            return self._load()
        if name == "open":
            title = "opening, CPU seconds of all threads"
            return [Figure(name, title, "ms of CPU", self._once("open"), tokens, 1e3, False)]
        if name == "start":
            title = f"start: imports, opening, a prompt of {tokens}"
            return [Figure(name, title, "ms", self._once("start"), tokens, 1e3, False)]
        if name == "memory":
            if not memory():
                self._left[name] = "this system does not tell it"
                return []
            return [
                Figure(work, title, "MiB", self._once(work), tokens, _MIB, False)
                for work, title in MEMORY_TITLES.items()
            ]
        return [self._files()]

    def _fits(self, name: str, count: int) -> bool:
        if count > self._limit:
            self._left[name] = f"the model has no more than {self._limit} positions"
        return count <= self._limit

    def _tokens(self, work: Work) -> tuple[Taker, ...]:
        """Everyone, one row."""
        takers = [Taker(key, key, work, computes=self._base) for key in (OFF, OFF + AGAIN)]
        if self._names:
            on = self._names[0]
            for entry in self._ways():
                name = f"{entry}: {on}"
                takers.append(Taker(name, entry, work, (on,), computes=f"adapter {on}"))
        for rival in self._rivals:
            takers += rival.takers(work)
        return tuple(takers)

    def _ways(self) -> list[str]:
        keys = [entry.key for entry in self._entries()]
        return [key for key in ("on", PINNED) if key in keys]

    def _once(self, work: Work) -> tuple[Taker, ...]:
        """Every process, for what it has once."""
        own = [OFF, OFF + AGAIN, *self._ways()]
        takers = []
        for key in own:
            adapter = None if key.startswith(OFF) else self._names[0]
            name = key if adapter is None else f"{key}: {adapter}"
            takers.append(Taker(name, key, work, (adapter,)))
        for rival in self._rivals:
            takers += rival.takers(work)
        return tuple(takers)

    def _batch(self, tokens: int) -> list[Figure]:
        if not self._names:
            self._left["batch"] = "the bundle has no adapters to choose from"
            return []
        mixed = self._mixed()
        kinds = len(set(mixed))
        title = f"{ROWS} rows with {kinds} different adapters, after prompts of {tokens}"
        same = (self._names[0],) * ROWS
        none = (None,) * ROWS
        one = "one row after another"
        takers = [
            Taker(one, OFF, "decode", mixed, together=False),
            Taker(one + AGAIN, OFF + AGAIN, "decode", mixed, together=False),
            Taker("rows of different adapters", "on", "decode", mixed),
            Taker(f"all rows {self._names[0]}", "on", "decode", same),
            Taker("all rows off", "on", "decode", none),
        ]
        for rival in self._rivals:
            takers += rival.batch(mixed)
        return [Figure("batch", title, "tokens/s", tuple(takers), tokens, ROWS)]

    def _mixed(self) -> tuple[str | None, ...]:
        """Eight rows, as different as the bundle allows."""
        choices: list[str | None] = list(self._names[:ROWS])
        choices = [x for x in choices if x is None or not self._bundle.adapter(x).invocation]
        if len(choices) < ROWS:
            choices.append(None)
        return tuple(choices[row % len(choices)] for row in range(ROWS))

    def _switch(self, tokens: int) -> list[Figure]:
        if not self._names:
            self._left["switch"] = "the bundle has no adapters to choose from"
            return []
        pair: tuple[str | None, ...] = (self._names[0], *self._names[1:2])
        pair = pair if len(pair) == 2 else (*pair, None)
        on = (self._names[0],)
        step = f"one token with {self._names[0]}"
        takers = [
            Taker(step, OFF, "decode", on),
            Taker(step + AGAIN, OFF + AGAIN, "decode", on),
            Taker(f"switch {pair[0]}, {pair[1] or 'off'}", "on", "switch", pair),
        ]
        for rival in self._rivals:
            takers += rival.switch(pair)
        # A cost beside a cost: how much of a token's time a switch takes.
        return [
            Figure("switch", "switch to a loaded adapter", "ms", tuple(takers), tokens, 1e3, False)
        ]

    def _load(self) -> list[Figure]:
        if not self._names:
            self._left["load"] = "the bundle has no adapters to load"
            return []
        on = (self._names[-1],)
        entry = self._bundle.adapter(self._names[-1])
        size = self._bundle.manifest.files[entry.file].bytes / 1e6
        title = f"load {self._names[-1]} ({size:,.1f} MB)"
        name = f"load {self._names[-1]}"
        takers = [
            Taker(name, OFF, "load", on),
            Taker(name + AGAIN, OFF + AGAIN, "load", on),
        ]
        for rival in self._rivals:
            takers += rival.load(on)
        return [Figure("load", title, "ms of CPU", tuple(takers), 0, 1e3, False)]

    def _files(self) -> Figure:
        files = self._bundle.manifest.files
        graph = sum(x.bytes for name, x in files.items() if name.startswith("onnx/"))
        takers = [Taker("graph and weights", OFF, "files", bytes=graph)]
        for name in self._names:
            size = files[self._bundle.adapter(name).file].bytes
            takers.append(Taker(f"adapter {name}", OFF, "files", bytes=size))
        for rival in self._rivals:
            if rival.bytes:
                takers.append(Taker(rival.name, OFF, "files", bytes=rival.bytes))
        return Figure("files", "sizes of files", "MB", tuple(takers), 0, 1e-6, False)
