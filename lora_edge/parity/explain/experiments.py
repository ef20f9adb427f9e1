"""A failed batch run again in other ways, to find out what is wrong with it.

Knows runners, adapter files and PEFT directories; judges nothing (see ``diagnosis``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lora_edge.adapter.load import Adapter, load_adapter
from lora_edge.bundle.onnx_adapter import read_adapter
from lora_edge.maths.lora import FloatArray
from lora_edge.names import lora_input
from lora_edge.parity.explain.failure import Outputs, Run, Scaled
from lora_edge.parity.explain.repairs import Tensors, repairs
from lora_edge.parity.plan.states import BASE, Probe, Row, State, label, only
from lora_edge.parity.subjects import Subject
from lora_edge.runtime import Runner

_SAME = 1e-5  # of a tensor's largest value
_NAMED = 3


@dataclass(frozen=True)
class Experiments:
    """Other runs of one state on the rows of a batch.

    A :class:`~lora_edge.parity.explain.failure.Bench`.

    Attributes:
        runner: the bundle in a session.
        subject: how the bundle is asked.
        probe: what failed.
        tails: the continuation of each of its rows.
        row: the one row of a mixed batch that failed; None for other batches.
        state: what is active on the rows.
        others: names of the adapters whose outputs these may be.
        tensors: adapter -> tensors used in place of its own in every run.
    """

    runner: Runner
    subject: Subject
    probe: Probe
    tails: Sequence[Row]
    row: int | None
    state: State
    others: Sequence[str]
    tensors: Mapping[str, Tensors] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[Row, ...]:
        """The prompts."""
        return self.probe.rows if self.row is None else (self.probe.rows[self.row],)

    @property
    def _own_tails(self) -> Sequence[Row]:
        return self.tails if self.row is None else (self.tails[self.row],)

    @property
    def _switchable(self) -> bool:
        return self.runner.bundle.manifest.mode == "switchable"

    def off(self) -> tuple[Outputs, Experiments] | None:
        """The rows without an adapter; of a task, with the adapter's head and nothing else of it.

        Prompts of a mixed batch run alone.
        """
        if not self._switchable or not self.state:
            return None
        if self.subject.headed:
            bench = replace(self, tensors={name: self._headed(name) for name, _ in self.state})
        else:
            bench = replace(self, state=BASE)
        return bench._run(self.rows, self._own_tails), bench

    def alone(self) -> Outputs | None:
        """Each row in a batch of its own."""
        if len(self.probe.rows) == 1:
            return None
        pairs = zip(self.rows, self._own_tails, strict=True)
        return [self._run((row,), (tail,))[0] for row, tail in pairs]

    def alike(self) -> Outputs | None:
        """The row of a mixed batch, with its own state on all rows."""
        if self.row is None:
            return None
        return [self._run(self.probe.rows, self.tails, self.probe.rests)[self.row]]

    def awake(self) -> Outputs | None:
        """The batch as it was, but that no row rests, and all end when the first would."""
        if not self.probe.rests:
            return None
        shortest = min(map(len, self.tails))
        tails = [tail[:shortest] for tail in self.tails]
        found = self._observed(replace(self.probe, rests=()), tails)
        return found if self.row is None else [found[self.row]]

    def copies(self, row: int, count: int) -> Outputs:
        """One of the rows so many times, as one batch."""
        return self._run((self.rows[row],) * count, (self._own_tails[row],) * count)

    @property
    def batch(self) -> int:
        """How many rows the batch has that failed."""
        return len(self.probe.rows)

    def at_once(self) -> Outputs | None:
        """Each row alone, its continuation as part of the prompt."""
        invoked = any(self._invocation(name) for name, _ in self.state)
        if not self.subject.behind or not any(self.tails) or invoked:
            return None  # an aLoRA begins where the prompt says
        pairs = zip(self.rows, self._own_tails, strict=True)
        return [self._run(((*row, *tail),), ((),))[0] for row, tail in pairs]

    def lookalikes(self) -> Iterator[tuple[str, Run]]:
        """Other states: other adapters, other weights, those of the other rows."""
        if not self._switchable:
            return
        if self.row is not None:
            for state in dict.fromkeys(self.probe.states):
                if state != self.state:
                    yield (
                        f"it does what {label(state)} does, which other rows have",
                        self._in(state),
                    )
        names = [name for name, _ in self.state]
        if len(names) > 1:
            for name in names:
                yield f"it does what {name} alone does", self._in(only(name))
            ones = tuple((name, 1.0) for name in names)
            yield "its weights are ignored: it does what all at weight 1 do", self._in(ones)
            if len(names) > 2:
                for name, _ in self.state:
                    rest = tuple(part for part in self.state if part[0] != name)
                    yield f"{name} is left out: it does what {label(rest)} does", self._in(rest)
            plain = tuple((name, abs(weight)) for name, weight in self.state)
            if plain != self.state:
                yield f"signs are ignored: it does what {label(plain)} does", self._in(plain)
            turned = tuple(zip(names, [w for _, w in reversed(self.state)], strict=True))
            yield "its weights are exchanged", self._in(turned)
        elif self.state and self.state[0][1] != 1.0:
            yield "its weight is ignored: it does what weight 1 does", self._in(only(names[0]))
            if self.state[0][1] < 0:
                plain = ((names[0], -self.state[0][1]),)
                yield f"its sign is ignored: it does what {label(plain)} does", self._in(plain)
        for name in self.others:
            if name not in names:
                yield f"it does what {name} does", self._in(only(name))

    def leaks(self) -> Iterator[tuple[str, Scaled]]:
        """The states of other rows, with a share of each added to the row's own."""
        bundle = self.runner.bundle
        for state in dict.fromkeys(self.probe.states):
            names = {name for name, _ in (*state, *self.state)}
            if state and state != self.state and not any(bundle.adapter(n).alone for n in names):
                yield label(state), self._with_share(state)

    def remedies(self) -> Iterator[tuple[str, Run]]:
        """The bundle's other adapters, and this one with its tensors put right."""
        if not self._switchable:
            return
        names = [name for name, _ in self.state]
        if len(names) == 1 and self.state[0][1] == 1.0:
            for other in self.others:
                if other != names[0]:
                    yield f"the bundle's {other} does what {names[0]} should", self._in(only(other))
        for name in () if self.runner.foreign else names:
            for clause, tensors in repairs(self._tensors(name)):
                yield f"{name}: {clause}", self._with({name: tensors})

    def scaled(self) -> Iterator[tuple[str, int, Scaled]]:
        """Each adapter with its B multiplied."""
        if not self._switchable or self.runner.foreign:
            return
        for name, _ in self.state:
            own = self._tensors(name)
            ranks = [b.shape[0] for key, b in own.items() if key.endswith(".B") and b.any()]
            if ranks:
                yield name, max(ranks), self._multiplied(name, own)

    def findings(self) -> str:
        """The first of the adapters whose file says something."""
        if not self._switchable:
            return ""
        return next((said for name, _ in self.state if (said := self._finding(name))), "")

    def marks(self) -> tuple[tuple[Row, ...], bool]:
        """What the adapter waits for: its invocation (True), or the tokens that it trains."""
        if not self._switchable or len(self.state) != 1:
            return (), False
        name = self.state[0][0]
        if invocation := self._invocation(name):
            return (invocation,), True
        directory = self.runner.bundle.directory / "adapters" / name / "peft"
        tokens = load_adapter(directory, name).tokens if directory.is_dir() else {}
        return tuple((index,) for rows in tokens.values() for index in rows.indices), False

    def _run(
        self, rows: Sequence[Row], tails: Sequence[Row], rests: tuple[int, ...] = ()
    ) -> list[FloatArray]:
        states = (self.state,) * len(rows)
        probe = replace(self.probe, kind="adapter", rows=tuple(rows), states=states, rests=rests)
        return self._observed(probe, tails)

    def _observed(self, probe: Probe, tails: Sequence[Row]) -> list[FloatArray]:
        try:
            for name, tensors in self.tensors.items():
                self.runner.override(name, tensors)
            return self.subject.observe(self.runner, probe, tails)
        finally:
            for name in self.tensors:
                self.runner.override(name, None)

    def _prompts(self, indices: Sequence[int]) -> list[FloatArray]:
        return self._run([self.rows[i] for i in indices], [()] * len(indices))

    def _in(self, state: State) -> Run:
        return replace(self, state=state)._prompts

    def _with(self, tensors: Mapping[str, Tensors]) -> Run:
        return replace(self, tensors=tensors)._prompts

    def _with_share(self, state: State) -> Scaled:
        def run(indices: Sequence[int], share: float) -> Outputs:
            weights = dict(self.state)
            for name, weight in state:
                weights[name] = weights.get(name, 0.0) + share * weight
            return replace(self, state=tuple(sorted(weights.items())))._prompts(indices)

        return run

    def _multiplied(self, name: str, own: Tensors) -> Scaled:
        def run(indices: Sequence[int], factor: float) -> Outputs:
            tensors = {
                key: value * np.float32(factor) if key.endswith(".B") else value
                for key, value in own.items()
            }
            return self._with({name: tensors})(indices)

        return run

    def _tensors(self, name: str) -> dict[str, FloatArray]:
        bundle = self.runner.bundle
        return read_adapter(bundle.verify(bundle.adapter(name).file))

    def _invocation(self, name: str) -> Row:
        return self.runner.bundle.adapter(name).invocation

    def _headed(self, name: str) -> Tensors:
        kept = (".A", ".gate", ".W", ".c", ".select")
        own = self._tensors(name)
        return {key: value if key.endswith(kept) else value * 0 for key, value in own.items()}

    def _finding(self, name: str) -> str:
        """What an adapter's file has otherwise than its PEFT files."""
        own = self._tensors(name)
        bad = [key for key, value in own.items() if not np.isfinite(value).all()]
        if bad:
            return f"the file of {name} holds NaN or Inf, first in {bad[0]}"
        directory = self.runner.bundle.directory / "adapters" / name / "peft"
        if not directory.is_dir():
            return ""
        adapter = load_adapter(directory, name)
        found = dict(_against(own, adapter))
        odd = [f"{what} ({how})" for what, how in found.items() if how]
        if not odd:
            return f"the file of {name} holds what its PEFT files do" if _plain(adapter) else ""
        more = f" and {len(odd) - _NAMED} more" if len(odd) > _NAMED else ""
        return (
            f"the file of {name} differs from its PEFT files at {len(odd)} of {len(found)} places: "
            f"{', '.join(odd[:_NAMED])}{more}"
        )


def _plain(adapter: Adapter) -> bool:
    """Nothing of it depends on the base, so that all of it was compared."""
    heads = tuple(f"{head}." for head in adapter.heads)
    pairs = adapter.modules.values()
    return (
        all(x.kind == "linear" and x.magnitude is None and x.bias is None for x in pairs)
        and all(path.startswith(heads) for path in adapter.saved)
        and not (adapter.tokens or adapter.stacked)
    )


def _against(own: Tensors, adapter: Adapter) -> Iterator[tuple[str, str]]:
    """Places where a file can be held against PEFT's, and what is wrong there; empty: nothing.

    Of what depends on the base (DoRA, what replaces a parameter, embeddings that are scaled) only
    this: whether it is there.
    """
    for path, pair in adapter.modules.items():
        a, b = own.get(lora_input(path, "A")), own.get(lora_input(path, "B"))
        if a is None or b is None:
            continue
        if not b.any() and pair.b.any():
            yield path, "B is zero"
        elif pair.magnitude is not None:
            dropped = not own[lora_input(path, "G")].any()
            yield path, "its magnitude is dropped" if dropped else ""
        elif pair.kind == "linear":
            wanted = pair.factors()
            odd = ["A"] * _differ(a, wanted.A) + ["B"] * _differ(b, wanted.B)
            yield path, " and ".join(odd)
        if pair.bias is not None and pair.bias.any():
            yield f"{path}.bias", "" if own[lora_input(path, "bias")].any() else "it is dropped"
    for path, value in adapter.saved.items():
        module, _, what = path.rpartition(".")
        head = own.get(lora_input(module, "W" if what == "weight" else "c"))
        key = f"lora.{path}"
        if head is not None:
            same = not _differ(head.reshape(value.T.shape), value.T)
            yield path, "" if same else "it is another one" if head.any() else "it is zero"
        elif key in own:
            yield path, "" if own[key].any() else "it is the base's"
    for path in adapter.tokens:
        b = own.get(lora_input(path, "B"))
        if b is not None:
            yield f"rows of {path}", "" if b.any() else "they are dropped"


def _differ(one: FloatArray, other: FloatArray) -> bool:
    if one.shape != other.shape:
        return True
    return bool(one.size and np.abs(one - other).max() > _SAME * np.abs(other).max())
