"""How far a run went, and where it did not go: what a verdict says nothing of.

Knows probes and the size of the model; knows nothing of runtimes or PyTorch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_edge.bundle.bundle import Bundle
from lora_edge.names import NONE_ADAPTER
from lora_edge.parity.plan.states import label
from lora_edge.parity.record.golden import Golden

_LONG = 64  # tokens; a longer prompt is long


@dataclass(frozen=True)
class Reach:
    """How far a run went.

    Attributes:
        prompt: tokens of the longest prompt; 0 where the inputs are no tokens.
        decoded: most tokens that were decoded after one prompt.
        row: tokens of the longest row, prompt and continuation.
        model: tokens that a row may have; ``None``: any number.
        batches: the sizes of batches, ascending.
        tokens: different token ids that were fed.
        vocabulary: token ids that there are; 0 where the inputs are no tokens.
        adapters: number of the bundle's adapters.
        long: number of those that had a prompt of more than 64 tokens.
        blends: the blends and weights that were run.
        others: whether other blends or weights can be asked for.
        fewer: why fewer prompts were compared than usual; empty: they were not.
    """

    prompt: int
    decoded: int
    row: int
    model: int | None
    batches: tuple[int, ...]
    tokens: int
    vocabulary: int
    adapters: int
    long: int
    blends: tuple[str, ...]
    others: bool
    fewer: str = ""

    def to_data(self) -> dict[str, Any]:
        """As JSON-ready values, with :meth:`line`."""
        plain = dataclasses.asdict(self)
        return {**plain, "batches": list(self.batches), "blends": list(self.blends)} | {
            "line": self.line()
        }

    def line(self) -> str:
        """What was reached, and what was not, in one line."""
        if not self.batches:
            return "Reached: nothing."
        done = [f"batches of {_listed([str(size) for size in self.batches])}"]
        left: list[str] = []
        larger = f"batches of more than {self.batches[-1]}"
        if self.vocabulary:
            decoded = f" and {self.decoded} decoded" if self.decoded else ""
            done.insert(0, f"prompts of up to {self.prompt} tokens{decoded}")
            done.append(f"{self.tokens:,} of {self.vocabulary:,} tokens of the vocabulary")
            if self.model is None or self.row < self.model:
                most = f" of the model's {self.model:,}" if self.model else ""
                left.append(f"rows of more than {self.row}{most} tokens")
            if self.decoded:
                left.append(f"more than {self.decoded} decoded tokens")
            left.append(larger)
            if self.tokens < self.vocabulary:
                share = 100 * (1 - self.tokens / self.vocabulary)
                left.append(f"{share:.3g} % of the vocabulary")
            if self.prompt > _LONG and self.long < self.adapters:
                left.append(
                    f"prompts of more than {_LONG} tokens of {self.adapters - self.long} of "
                    f"{self.adapters} adapters"
                )
        else:
            left.append(larger)
        if self.blends:
            done.append(f"the blend{'s' * (len(self.blends) > 1)} {_listed(self.blends)}")
        if self.others:
            left.append("other blends and weights" if self.blends else "blends and weights")
        fewer = f" {self.fewer}." if self.fewer else ""
        return f"Reached: {', '.join(done)}. Not reached: {', '.join(left)}.{fewer}"


def reach_of(bundle: Bundle, goldens: Iterable[Golden], fewer: str = "") -> Reach:
    """How far the golden cases go that a run compared; ``fewer``: why they are fewer than usual."""
    manifest = bundle.manifest
    reads = manifest.reads
    by_token = not reads.sample
    found = list(goldens)
    probes = [golden.probe for golden in found]
    fed = {
        token
        for golden in found
        for row in ((*golden.probe.rows, *golden.tails) if by_token else golden.tails)
        for token in row
    }
    # An encoder-decoder's continuation is beside the prompt, not behind it.
    behind = reads is manifest.gives
    rows = [
        (len(row), len(tail), state)
        for golden in found
        for row, tail, state in zip(
            golden.probe.rows, golden.tails, golden.probe.states, strict=True
        )
    ]
    names = set(manifest.adapters) - {NONE_ADAPTER}
    weighted = {s for p in probes for s in p.states if len(s) > 1 or any(w != 1 for _, w in s)}
    free = [name for name in names if not manifest.adapters[name].alone]
    return Reach(
        prompt=max((length for length, _, _ in rows), default=0) if by_token else 0,
        decoded=max((tail for _, tail, _ in rows), default=0),
        row=max((n + behind * tail for n, tail, _ in rows), default=0) if by_token else 0,
        model=reads.max_length or None if by_token else None,
        batches=tuple(sorted({len(probe.rows) for probe in probes})),
        tokens=len(fed) if by_token else 0,
        vocabulary=reads.vocab_size if by_token else 0,
        adapters=len(names),
        long=len({name for length, _, state in rows if length > _LONG for name, _ in state}),
        blends=tuple(dict.fromkeys(label(s) for p in probes for s in p.states if s in weighted)),
        others=manifest.mode == "switchable" and bool(free),
        fewer=fewer,
    )


def _listed(words: Sequence[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
