"""A bundle in another runtime, as a Runner: what the graph gives comes from there.

Everything that compares, switches, explains and measures drift asks a Runner; this one hands rows
of token ids to a client, which reads the adapters' files, feeds the graph and keeps the cache by
itself. What a client cannot be asked (other tensors in an adapter's place) is run here.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_edge.bundle.bundle import Bundle
from lora_edge.bundle.part import Part
from lora_edge.clients.catalog import kind_of
from lora_edge.clients.client import Client
from lora_edge.errors import OptionError
from lora_edge.maths.lora import FloatArray
from lora_edge.parity.around.asked import OF, TOKENIZER
from lora_edge.parity.around.golden import load_around
from lora_edge.parity.case import Case
from lora_edge.parity.plan.states import Probe
from lora_edge.parity.report import Session
from lora_edge.runtime import Runner
from lora_edge.runtime.adapters.binding import Binding

_SHOWN = 12  # token ids of a text


class InsideRunner(Runner):
    """A Runner whose graph runs in a client.

    Args:
        bundle: of one graph.
        command: what starts the client's driver.
        name: of the client.
        exact: the graph that computes in floats, where there are two.

    Attributes:
        client: the driver.
        exact: as given.
        half: the client computes in float16 alone, whatever the graph says.

    Raises:
        OptionError: the bundle has two graphs, or not the one that the client runs.
        ProcessError: the client cannot be started, or cannot open the bundle.
    """

    foreign = True

    def __init__(self, bundle: Bundle, command: Sequence[str], name: str, *, exact: bool) -> None:
        if len(bundle.manifest.parts) > 1:
            raise OptionError(
                f"{name}: encoder-decoders are not run in clients",
                "Leave out --in; lora-edge's own runner runs them.",
            )
        part = bundle.manifest.reads
        kind = kind_of(name)
        static = part.static if kind is not None and kind.static else None
        if kind is not None and kind.static and static is None:
            raise OptionError(
                f"{name} runs graphs with fixed shapes, and {bundle.directory} has none",
                "Export it with --target qnn, or --static.",
            )
        super().__init__(bundle, exact=exact, session_cache=False, static=static is not None)
        self.exact = exact
        self.half = kind is not None and kind.half
        graph = (exact and part.exact) or part.file if static is None else static.file
        self.client = Client(name, command, bundle.directory, graph)
        self._end = weakref.finalize(self, self.client.close)
        self._changed: set[str] = set()

    @property
    def decoder(self) -> Any:
        """The client's; this process' own while other tensors are in an adapter's place."""
        own = super().decoder
        return own if self._changed else _Decoder(self.client, own.part)

    @property
    def encoder(self) -> Any:
        """As :attr:`decoder`."""
        own = super().encoder
        return _Encoder(self, own)

    @property
    def changed(self) -> bool:
        """Whether other tensors are in an adapter's place."""
        return bool(self._changed)

    def override(self, name: str, tensors: Mapping[str, NDArray[np.floating]] | None) -> None:
        super().override(name, tensors)
        (self._changed.discard if tensors is None else self._changed.add)(name)

    def takes(self, probe: Probe) -> bool:
        """Whether the client can be asked this."""
        needs = {
            "mixed": len(set(probe.states)) > 1,
            "blend": any(state and (len(state) > 1 or state[0][1] != 1) for state in probe.states),
            "rests": bool(probe.rests) and "batch" in self.client.can,
        }
        return all(what in self.client.can for what, needed in needs.items() if needed)

    def seen(self, left_out: Sequence[str]) -> Session:
        """What a report says of it; ``left_out``: cases that it cannot be asked."""
        precision = "fp16" if self.half else self.bundle.manifest.precision
        told = self.client.about
        left = [*left_out]
        if "encode" in self.client.can and not takes_nul(self):
            left.append("texts with a NUL character")
        graph = self.graph_file if self.room is not None else ""
        return Session(
            self.client.name, "", precision, client=told, left_out=tuple(left), graph=graph
        )

    def __enter__(self) -> InsideRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()


class _Decoding:
    """Sequences of one batch in a client; as much of a Decoding as comparing asks for.

    Where the client takes no batches, each row is one of its own.
    """

    def __init__(self, client: Client, states: Sequence[Mapping[str, float]]) -> None:
        self._client = client
        whole = "batch" in client.can
        self._batches = [list(range(len(states)))] if whole else [[i] for i in range(len(states))]
        for sequence, rows in enumerate(self._batches):
            client.start([states[row] for row in rows], sequence)

    def extend_all(self, rows: Sequence[Sequence[int]]) -> list[FloatArray]:
        return self._extended(rows, every=True)

    def step(self, tokens: Sequence[int | None]) -> FloatArray:
        rows = [() if token is None else (token,) for token in tokens]
        found = self._extended(rows, every=False)
        width = max(row.shape[-1] for row in found)
        return np.stack([row[-1] if row.size else np.zeros(width, np.float32) for row in found])

    def _extended(self, rows: Sequence[Sequence[int]], *, every: bool) -> list[FloatArray]:
        found: list[FloatArray] = []
        for sequence, batch in enumerate(self._batches):
            own = [rows[row] for row in batch]
            if any(own):
                found += self._client.extend(own, every=every, sequence=sequence)
            else:  # it has ended
                found.append(np.zeros((0, 0), np.float32))
        return found


class _Decoder:
    def __init__(self, client: Client, part: Part) -> None:
        self._client = client
        self.part = part

    def start(self, batch: int, max_length: int, binding: Binding) -> _Decoding:  # noqa: ARG002
        return _Decoding(self._client, _states(binding, batch))


class _Encoder:
    """An Encoder whose batches run in the client, without their padding."""

    def __init__(self, runner: InsideRunner, own: Any) -> None:
        self._runner = runner
        self._own = own
        self.part = own.part
        self.feeds = own.feeds

    def run(self, feeds: Mapping[str, NDArray[Any]], binding: Binding) -> NDArray[np.float32]:
        if self._runner.changed:
            found: NDArray[np.float32] = self._own.run(feeds, binding)
            return found
        batch = len(next(iter(feeds.values())))
        client = self._runner.client
        mask = feeds.get("attention_mask")
        ends = [None] * batch if mask is None else mask.sum(1).tolist()
        rows = [
            {name: array[index, : ends[index]] for name, array in feeds.items()}
            for index in range(batch)
        ]
        states = _states(binding, batch)
        if "batch" in client.can:
            outputs = client.outputs(rows, states)
        else:
            pairs = zip(rows, states, strict=True)
            outputs = [client.outputs([row], [state])[0] for row, state in pairs]
        shape = [max(sizes) for sizes in zip(*(x.shape for x in outputs), strict=True)]
        whole = np.zeros((batch, *shape), np.float32)
        for index, output in enumerate(outputs):
            places: tuple[slice, ...] = tuple(slice(size) for size in output.shape)
            whole[index][places] = output
        return whole


def _states(binding: Binding, batch: int) -> list[dict[str, float]]:
    states = binding.states if len(binding.states) == batch else binding.states * batch
    return [dict(state) for state in states]


def takes_nul(runner: InsideRunner) -> bool:
    """Whether the client's tokenizer reads texts with a NUL character, at which C strings end."""
    return "nul" in runner.client.can


def tokens_in(runner: InsideRunner) -> Iterator[Case]:
    """One case for each tokenizer: the client's own tokens of the texts that were recorded."""
    kept = load_around(runner.bundle)
    if kept is None or "encode" not in runner.client.can:
        return
    name = runner.client.name
    for aspect, wanted in kept.items():
        kind, _, adapter = aspect.partition(OF)
        if kind != TOKENIZER:
            continue
        case = f"tokens of texts{OF}{adapter}" if adapter else "tokens of texts"
        odd = ""
        texts = [row for row in wanted["texts"] if "\0" not in row["text"] or takes_nul(runner)]
        for row in texts:
            found = runner.client.encode(row["text"], adapter or None)
            if found != row["ids"]:
                odd = f"{case}: {name} reads {row['text'][:40]!r} as {_shown(found)}, expected "
                odd += f"{_shown(row['ids'])}{_what(found, row)}"
                break
        yield Case(case, (), "failed" if odd else "passed", odd, kind="around", session=name)


def _what(found: Sequence[int], row: Mapping[str, Any]) -> str:
    wanted = row["ids"]
    if found == row["plain"]:
        return ": the special tokens are left out"
    if found == wanted[1:]:
        return f": the first token, {wanted[0]}, is left out"
    if found == wanted[:-1]:
        return f": the last token, {wanted[-1]}, is left out"
    return ""


def _shown(ids: Sequence[int]) -> str:
    more = ", …" if len(ids) > _SHOWN else ""
    return f"[{', '.join(map(str, ids[:_SHOWN]))}{more}]"
