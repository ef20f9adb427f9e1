"""Rows beside llama.cpp: speed with an adapter, and what of it an adapter leaves."""

from __future__ import annotations

from collections.abc import Callable

from environments import llama_cpp_library
from made import ON as ADAPTER
from made import Made
from row import OFF, ON, Row, decoding, plan_of

from lora_edge.bench.plan import AGAIN, Entry, Plan, Taker
from lora_edge.bench.rivals import Given, rival

_BOTH = ("fp32", "int4")
_LLAMA_ON, _LLAMA_OFF = "llama.cpp, on", "llama.cpp, off"
RIVAL_ROWS = (
    Row(
        "llama.cpp", "on / llama.cpp with --lora, decode",
        "llama.cpp", _BOTH, "decode", ON, "", {"fp32": 0.0, "": 1.1},
    ),
    Row(
        "on-off-llama.cpp", "on / off, llama.cpp",
        "llama.cpp", _BOTH, "decode", _LLAMA_ON, _LLAMA_OFF, {"": 0.0},
    ),
    Row(
        "kept-llama.cpp", "on / off, ours / llama.cpp's",
        "llama.cpp", _BOTH, "decode", ON, OFF, {"": 1.0}, beside=(_LLAMA_ON, _LLAMA_OFF),
    ),
)  # fmt: skip


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
    off, on = rival("llama.cpp", Given(bundle, ADAPTER, 1024, paths)).ways
    own = {"bundle": str(bundle.directory)}
    again = Entry(on.entry.key + AGAIN, "llama.cpp", on.entry.given)
    entries = [
        on.entry,
        again,
        off.entry,
        Entry(ON, "bundle", {**own, "first": ADAPTER}),
        Entry(OFF, "bundle", own),
    ]
    takers = [
        Taker(on.entry.key, on.entry.key, "decode", computes=on.computes),
        Taker(again.key, again.key, "decode", computes=on.computes),
        Taker(off.entry.key, off.entry.key, "decode", computes=off.computes),
        Taker(ON, ON, "decode", (ADAPTER,), computes=on.computes),
        Taker(OFF, OFF, "decode", computes=off.computes),
    ]
    return plan_of(bundle, entries, [decoding(takers)])


RIVAL_BENCHES: dict[str, Callable[[Made, str], Plan]] = {"llama.cpp": llama_cpp}
