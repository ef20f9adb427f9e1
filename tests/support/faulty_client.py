"""A client that makes one mistake: ``python faulty_client.py FAULT``, over Python's driver."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_edge.clients.drivers import plain
from lora_edge.clients.drivers.talk import talk


class Fault(NamedTuple):
    """A mistake, the case that shows it, and what is said of it; empty: the session ends."""

    make: Callable[[], None]
    case: str
    said: str


FAULTS: dict[str, Fault] = {}


def _fault(name: str, case: str = "", said: str = "") -> Callable[[Callable[[], None]], None]:
    def add(make: Callable[[], None]) -> None:
        FAULTS[name] = Fault(make, case, said)

    return add


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    old = getattr(owner, name)
    setattr(owner, name, lambda self, *given, **more: around(old, self, *given, **more))


@_fault("not fed", "adapter echo", "the adapter does nothing: the outputs are the base's")
def _not_fed() -> None:
    """The base's inputs are fed, whatever adapter is asked for."""
    _wrap(plain.Bound, "__init__", lambda old, self, b, states: old(self, b, [{} for _ in states]))


@_fault("none for one", "adapter shout", "the adapter does nothing: the outputs are the base's")
def _none_for_one() -> None:
    """One adapter is taken for none."""

    def bound(old: Any, self: Any, bundle: Any, states: Sequence[Mapping[str, float]]) -> None:
        kept = [{k: v for k, v in state.items() if k != "shout"} for state in states]
        old(self, bundle, kept)

    _wrap(plain.Bound, "__init__", bound)


@_fault("exchanged", "adapter echo", "the bundle's mirror does what echo should")
def _exchanged() -> None:
    """Two adapters' files are exchanged."""
    swapped = {"echo": "mirror", "mirror": "echo"}
    _wrap(plain.Plain, "adapter", lambda old, self, name: old(self, swapped.get(name, name)))


@_fault("one factor", "adapter echo", "of the effect")
def _one_factor() -> None:
    """One layer has another layer's B."""

    def adapter(old: Any, self: Any, name: str) -> Any:
        found = dict(old(self, name))
        twins = [key for key in found if key.endswith(".B") and "layers.1." in key]
        key = next(x for x in twins if found[x].any() or name != "echo")
        if name == "echo":
            found[key] = found[key.replace("layers.1.", "layers.0.")]
        return found

    _wrap(plain.Plain, "adapter", adapter)


@_fault("another rank", "adapter echo", "part of the effect is missing or wrong")
def _other_rank() -> None:
    """Only half of the ranks arrive."""

    def adapter(old: Any, self: Any, name: str) -> Any:
        found = dict(old(self, name))
        for key in [key for key in found if key.endswith(".A") and name != "none"]:
            pair = key.removesuffix(".A") + ".B"
            half = max(1, found[key].shape[1] // 2)
            found[key], found[pair] = found[key][:, :half], found[pair][:half]
        return found

    _wrap(plain.Plain, "adapter", adapter)


@_fault("batch", "base", "the rows of a batch are not kept apart")
def _batch() -> None:
    """Every row of a batch has the mask of the first."""

    def run(old: Any, self: Any, rows: Any, fed: Any, totals: Any, begins: Any, *rest: Any) -> Any:
        mask, every = rest
        return old(self, rows, fed, totals, begins, mask[[0] * len(mask)], every)

    _wrap(plain.Decoding, "run", run)


@_fault("stale cache", "base", "the KV cache, or the positions of decode steps")
def _stale_cache() -> None:
    """The keys and values of the step before are fed once more."""

    def run(old: Any, self: Any, *given: Any) -> Any:
        past = self.past
        found = old(self, *given)
        if past["past_key_values.0.key"].shape[2]:
            fresh = self.past
            kept = past["past_key_values.0.key"].shape[2]
            self.past = {
                name: np.concatenate([past[name], fresh[name][:, :, kept - 1 : -1]], 2)
                for name in fresh
            }
        return found

    _wrap(plain.Decoding, "run", run)


@_fault("fifth position", "base", "right before position 5 in every row")
def _from_the_fifth() -> None:
    """Positions from the fifth on are wrong, as on a provider whose attention kernel is."""

    def run(old: Any, self: Any, *given: Any) -> Any:
        found = old(self, *given)
        for values, end in zip(found, map(len, self.history), strict=True):
            first = end - len(values)
            late = np.arange(first, end) >= 5
            values[late] += np.roll(values[late], 1, axis=1) * 0.2
        return found

    _wrap(plain.Decoding, "run", run)


@_fault("first token lost", "tokens of texts", "the special tokens are left out")
def _first_token_lost() -> None:
    """The tokenizer leaves out the first token, which begins every text."""


@_fault("another graph", "base", "onnx/exact.onnx was asked for")
def _other_graph() -> None:
    """The graph that rounds its activations runs in place of the one that computes in floats."""

    def opened(old: Any, self: Any, bundle: str, graph: str) -> Any:
        return old(self, bundle, graph.replace("exact", "model"))

    _wrap(plain.Plain, "open", opened)


@_fault("dies")
def _dies() -> None:
    """The process ends in the middle."""

    _wrap(plain.Plain, "extend", lambda *_, **__: sys.exit("out of memory"))


def main(fault: str) -> None:
    """Run the driver with a mistake."""
    FAULTS[fault].make()
    client = plain.Plain(openvino=False, provider=None)
    orders = {order: getattr(client, order) for order in ("open", "start", "extend", "outputs")}
    if fault == "first token lost":
        import tokenizers

        def opened(bundle: str, graph: str) -> Any:
            told = client.open(bundle, graph)
            reader = tokenizers.Tokenizer.from_file(f"{bundle}/tokenizer.json")

            def encode(text: str, adapter: str | None) -> Any:
                assert adapter is None
                return {"ids": reader.encode(text, add_special_tokens=False).ids}

            orders["encode"] = encode
            return {**told, "can": [*told["can"], "encode", "nul"]}

        orders["open"] = opened
    talk(orders)


if __name__ == "__main__":
    main(sys.argv[1])
