"""Rows beside llama.cpp and OpenVINO GenAI: speed with an adapter, and what of it one leaves."""

from __future__ import annotations

from collections.abc import Callable

from environments import llama_cpp_library, openvino_python
from made import ON as ADAPTER
from made import Made
from row import OFF, ON, Row, decoding, plan_of

from lora_edge.bench.plan import AGAIN, Entry, Plan, Taker
from lora_edge.bench.rivals import Given, Rival, rival
from lora_edge.bundle.bundle import Bundle

_BOTH = ("fp32", "int4")
_ROOM = 1024


def _rows(name: str, with_adapter: str, target: float) -> tuple[Row, ...]:
    on, off = f"{name}, on", f"{name}, off"
    return (
        Row(
            name, f"on / {with_adapter}, decode",
            name, _BOTH, "decode", ON, "", {"fp32": 0.0, "": target},
        ),
        Row(f"on-off-{name}", f"on / off, {name}", name, _BOTH, "decode", on, off, {"": 0.0}),
        Row(
            f"kept-{name}", f"on / off, ours / {name}'s",
            name, _BOTH, "decode", ON, OFF, {"": 1.0}, beside=(on, off),
        ),
    )  # fmt: skip


RIVAL_ROWS = (
    *_rows("llama.cpp", "llama.cpp with --lora", 1.1),
    *_rows("openvino", "OpenVINO GenAI with the adapter", 0.0),
)


def llama_cpp(made: Made, precision: str) -> Plan:
    """The bundle beside llama.cpp: float32, or Q4_0 weights, and the same adapter as a GGUF file.

    In float32 both compute the same, which is checked.
    """
    bundle = made.bundle(precision)
    library = llama_cpp_library()
    model, lora = made.gguf(precision, library)
    paths = {
        "llama.cpp": str(model),
        "llama.cpp-lora": str(lora),
        "llama.cpp-library": str(library),
    }
    return _beside(bundle, rival("llama.cpp", Given(bundle, ADAPTER, _ROOM, paths)))


def openvino(made: Made, precision: str) -> Plan:
    """The bundle beside OpenVINO GenAI's pipeline with the adapter's own file.

    In float32 both compute the same, which is checked. In int4 OpenVINO chooses how to compute.
    """
    python = openvino_python()
    bundle = made.bundle(precision)
    paths = {"openvino": str(made.openvino(precision, python))}
    given = Given(bundle, ADAPTER, _ROOM, paths, pythons={"openvino": str(python)})
    return _beside(bundle, rival("openvino", given))


def _beside(bundle: Bundle, found: Rival) -> Plan:
    """Ours and a rival, off and on; the rival with its adapter is the reference."""
    off, on = found.ways
    own = {"bundle": str(bundle.directory)}
    again = Entry(on.entry.key + AGAIN, on.entry.player, on.entry.given, on.entry.python)
    entries = [
        on.entry,
        again,
        off.entry,
        Entry(ON, "bundle", {**own, "first": ADAPTER}),
        Entry(OFF, "bundle", own),
    ]
    adapter, base = on.computes, off.computes
    takers = [
        Taker(on.entry.key, on.entry.key, "decode", computes=adapter),
        Taker(again.key, again.key, "decode", computes=adapter),
        Taker(off.entry.key, off.entry.key, "decode", computes=base),
        Taker(ON, ON, "decode", (ADAPTER,), computes=adapter),
        Taker(OFF, OFF, "decode", computes=base),
    ]
    return plan_of(bundle, entries, [decoding(takers)])


RIVAL_BENCHES: dict[str, Callable[[Made, str], Plan]] = {
    "llama.cpp": llama_cpp,
    "openvino": openvino,
}
