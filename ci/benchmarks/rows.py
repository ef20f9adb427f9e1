"""The rows of the table: what is compared, for which shapes, and what is to be reached.

A bench is a plan whose contestants run side by side; a row is one ratio in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from made import ADAPTERS, ON, Made, genai_installed
from rival_rows import RIVAL_BENCHES, RIVAL_ROWS
from row import OFF, LackingError, Row, decoding, plan_of, twice

from lora_edge.bench.plan import AGAIN, Entry, Figure, Plan, Taker, Work
from lora_edge.bench.rivals import Given, Rival, rival
from lora_edge.bench.standard import MEMORY_TITLES, Choices, standard_plan
from lora_edge.bundle.bundle import BASE_GRAPH_FILE, DATA_FILE, GRAPH_FILE, Bundle

PLAIN, OFF_PINNED, MERGED, GENAI = "plain", "off, pinned", "merged", "genai's graph"
SWITCH = "switch a0, a1"
_MIB = 1 / (1 << 20)
_ROOM = 4096
ON_NAME = f"on: {ON}"
PINNED_NAME = f"pinned: {ON}"
PEFT_NAME = f"PEFT, on: {ON}"
GENAI_ON, GENAI_OFF = f"genai, on: {ON}", "genai, off"
MIXED, ONE_BY_ONE, PEFT_MIXED = (
    "rows of different adapters",
    "one row after another",
    "peft, mixed batch",
)


_BOTH, _FP32 = ("fp32", "int4"), ("fp32",)
_INT4 = ("int4", "int4 head4")  # the default's output layer has 8 bits, the builder's 4
NATIVE = "int4 native"  # the bundle in int4, on the library of lora-edge native build
_BUILDER = "genai: genai-int4"
ROWS = (
    Row(
        "off-genai", "int4 off / genai's builder int4 in its own loop, decode",
        "genai", _INT4, "decode", OFF, "", {"": 0.97},
    ),
    Row(
        "size-genai", "int4 file size / genai's",
        "genai", _INT4, "files", "ours", "", {"": 1.1}, least=False,
    ),
    Row(
        "open-genai", "opening an int4 bundle, CPU s / genai's",
        "genai", _INT4, "open", OFF, "", {"": 1.2}, least=False,
    ),
    Row(
        "peak-genai", "opening an int4 bundle and decoding, peak memory / genai's",
        "genai", _INT4, "peak", OFF, "", {"": 1.1}, least=False,
    ),
    Row(
        "on-merged", "on / a graph without branches, decode",
        "plain", (*_BOTH, NATIVE), "decode", "on", "",
        {
            "135M fp32": 0.92, "1B fp32": 0.97, "135M int4": 0.80, "1B int4": 0.93,
            f"1B {NATIVE}": 0.93, "": 0.80,
        },
        limit=True,
    ),
    Row(
        "off-merged", "off / a graph without branches, decode",
        "plain", _BOTH, "decode", OFF, "", {"": 0.99},
    ),
    Row(
        "off-memory", "off, memory above a graph without branches, MiB",
        "plain", _BOTH, "pss", OFF, "", {"": 40.0}, least=False, kind="difference",
    ),
    Row(
        "off-private", "off, memory that no file holds above a graph without branches, MiB",
        "plain", _BOTH, "private", OFF, "", {"": 40.0}, least=False, kind="difference",
    ),
    Row(
        "loop", "the same graph and adapter in genai's own loop, ours / theirs",
        "loop", _BOTH, "decode", "on", "", {"": 1.0},
    ),
    Row(
        "off-loop", "off, the same graph in genai's own loop, ours / theirs",
        "loop", _BOTH, "decode", OFF, GENAI_OFF, {"": 1.0},
    ),
    Row("on-off", "on / off, ours", "loop", _BOTH, "decode", "on", OFF, {"": 0.0}),
    Row(
        "on-off-genai", "on / off, genai's own loop",
        "loop", _BOTH, "decode", GENAI_ON, GENAI_OFF, {"": 0.0},
    ),
    Row(
        "kept-genai", "on / off, ours / genai's own loop",
        "loop", _BOTH, "decode", "on", OFF, {"": 1.0}, beside=(GENAI_ON, GENAI_OFF),
    ),
    Row(
        "batch", "8 rows with 8 adapters / one after another",
        "batch", (*_BOTH, NATIVE), "batch", MIXED, "", {"": 4.3},
    ),
    Row(
        "batch-peft", "8 rows with 8 adapters / PEFT's mixed batch",
        "batch", _FP32, "batch", MIXED, PEFT_MIXED, {"": 2.0},
    ),
    Row(
        "switch", "switch between loaded adapters / one token",
        "switch", _BOTH, "switch", SWITCH, "", {"": 0.02}, least=False,
    ),
    Row(
        "load", "cold load of an adapter, ms of CPU",
        "load", _FP32, "load", f"load a{ADAPTERS - 1}", "", {"": 50.0}, least=False, kind="value",
    ),
    Row(
        "merged-genai", "merged / genai's graph, decode in our loop",
        "decode", _FP32, "decode", MERGED, GENAI, {"": 0.95},
    ),
    Row("on", "on / merged", "decode", _FP32, "decode", ON_NAME, MERGED, {"": 0.90}, limit=True),
    Row("off", "off / merged", "decode", _FP32, "decode", OFF, MERGED, {"": 0.98}),
    Row(
        "on-pinned", "on, pinned / merged",
        "decode", _FP32, "decode", PINNED_NAME, MERGED, {"": 0.98},
    ),
    Row(
        "off-pinned", "off, pinned / merged",
        "decode", _FP32, "decode", OFF_PINNED, MERGED, {"": 0.98},
    ),
    Row("on-peft", "on / PEFT eager", "decode", _FP32, "decode", ON_NAME, PEFT_NAME, {"": 3.0}),
)  # fmt: skip
ROWS = (*ROWS, *RIVAL_ROWS)
DECODE = tuple(row.name for row in ROWS if row.bench == "decode")


def limit_by_bytes(bundle: Bundle) -> float:
    """On / off if a step took the time that its bytes take: weights, and with them A and B."""
    files = bundle.manifest.files
    weights = sum(x.bytes for name, x in files.items() if name.startswith("onnx/"))
    return weights / (weights + files[bundle.adapter(ON).file].bytes)


def _each(takers: Sequence[Taker], work: Work) -> tuple[Taker, ...]:
    return tuple(Taker(x.name, x.entry, work, x.adapters) for x in takers)


def plain(made: Made, precision: str) -> Plan:
    """The switchable graph beside the same graph without branches, which merging leaves."""
    bundle = made.bundle(precision)
    own = {"bundle": str(bundle.directory)}
    graph = {**own, "file": str(bundle.directory / BASE_GRAPH_FILE), "own": True}
    entries = [
        *twice(PLAIN, "graph", graph),
        Entry(OFF, "bundle", own),
        Entry("on", "bundle", {**own, "first": ON}),
    ]
    takers = [
        Taker(PLAIN, PLAIN, "decode", computes="base"),
        Taker(PLAIN + AGAIN, PLAIN + AGAIN, "decode", computes="base"),
        Taker(OFF, OFF, "decode", computes="base"),
        Taker("on", "on", "decode", (ON,), computes="adapter"),
    ]
    memory = [
        Figure(work, title, "MiB", _each(takers, work), 128, _MIB, rate=False)
        for work, title in MEMORY_TITLES.items()
    ]
    return plan_of(bundle, entries, [decoding(takers), *memory])


def genai(made: Made, precision: str) -> Plan:
    """The bundle beside the graph of genai's builder, each in its own loop."""
    _needs_genai()
    bundle = made.bundle(precision)
    folder = made.genai(precision)
    own = {"bundle": str(bundle.directory)}
    theirs = f"genai: {folder.name}"
    entries = [
        *twice(theirs, "genai", {"folder": str(folder)}),
        Entry(OFF, "bundle", own),
        Entry("on", "bundle", {**own, "first": ON}),
    ]
    takers = [
        Taker(theirs, theirs, "decode"),
        Taker(theirs + AGAIN, theirs + AGAIN, "decode"),
        Taker(OFF, OFF, "decode"),
        Taker("on", "on", "decode", (ON,)),
    ]
    graph = sum(
        x.bytes for name, x in bundle.manifest.files.items() if name in (GRAPH_FILE, DATA_FILE)
    )
    size = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
    files = (Taker(theirs, OFF, "files", bytes=size), Taker("ours", OFF, "files", bytes=graph))
    figures = [
        decoding(takers),
        Figure("open", "opening", "s of CPU", _each(takers, "open"), rate=False),
        Figure("peak", "peak memory", "MiB", _each(takers, "peak"), 128, _MIB, rate=False),
        Figure("files", "graph and weights", "MB", files, 0, 1e-6, rate=False),
    ]
    return plan_of(bundle, entries, figures)


def loop(made: Made, precision: str) -> Plan:
    """The same graph and adapter in genai's loop and in ours."""
    _needs_genai()
    bundle = made.bundle(precision)
    found = rival("genai", Given(bundle, ON, _ROOM))
    if found.reason:
        raise LackingError(found.reason)
    off, on = found.ways
    own = {"bundle": str(bundle.directory)}
    again = Entry(on.entry.key + AGAIN, "genai", on.entry.given)
    entries = [
        *found.entries,
        again,
        Entry(OFF, "bundle", own),
        Entry("on", "bundle", {**own, "first": ON}),
    ]
    takers = [
        Taker(on.entry.key, on.entry.key, "decode", (ON,), computes="adapter"),
        Taker(again.key, again.key, "decode", (ON,), computes="adapter"),
        Taker(off.entry.key, off.entry.key, "decode", computes="base"),
        Taker("on", "on", "decode", (ON,), computes="adapter"),
        Taker(OFF, OFF, "decode", computes="base"),
    ]
    return plan_of(bundle, entries, [decoding(takers)])


def _peft(made: Made, bundle: Bundle) -> Rival:
    return rival("peft", Given(bundle, ON, _ROOM, base=str(made.base())))


def _standard(*figures: str) -> Callable[[Made, str], Plan]:
    """What ``lora-edge bench`` measures; PEFT's mixed batch beside float32."""

    def made_plan(made: Made, precision: str) -> Plan:
        bundle = made.bundle(precision)
        rivals = [_peft(made, bundle)] if precision == "fp32" and "batch" in figures else []
        return standard_plan(bundle, Choices(ON, figures), rivals)

    return made_plan


def decode(made: Made, precision: str) -> Plan:
    """Every way to decode in float32; all compute the base or the adapter, which is checked."""
    bundle = made.bundle(precision)
    own = {"bundle": str(bundle.directory)}
    rivals = _peft(made, bundle)
    entries = [
        *twice(MERGED, "bundle", {"bundle": str(made.merged())}),
        Entry(OFF, "bundle", own),
        Entry(ON_NAME, "bundle", own),
        Entry(OFF_PINNED, "bundle", {**own, "pinned": [None]}),
        Entry(PINNED_NAME, "bundle", {**own, "pinned": [ON]}),
        *rivals.entries,
    ]
    on = f"adapter {ON}"
    takers = [
        Taker(MERGED, MERGED, "decode", computes=on),
        Taker(MERGED + AGAIN, MERGED + AGAIN, "decode", computes=on),
        Taker(OFF, OFF, "decode", computes="base"),
        Taker(ON_NAME, ON_NAME, "decode", (ON,), computes=on),
        Taker(OFF_PINNED, OFF_PINNED, "decode", computes="base"),
        Taker(PINNED_NAME, PINNED_NAME, "decode", (ON,), computes=on),
        *rivals.takers("decode"),
    ]
    if genai_installed():
        file = str(made.genai(precision) / "model.onnx")
        entries.append(Entry(GENAI, "graph", {**own, "file": file}))
        takers.append(Taker(GENAI, GENAI, "decode", computes="base"))
    return plan_of(bundle, entries, [decoding(takers)])


def _needs_genai() -> None:
    if not genai_installed():
        raise LackingError("onnxruntime-genai is not installed; pip install onnxruntime-genai")


BENCHES: dict[str, Callable[[Made, str], Plan]] = {
    "genai": genai,
    "plain": plain,
    "loop": loop,
    "batch": _standard("batch"),
    "switch": _standard("switch"),
    "load": _standard("load"),
    "decode": decode,
    **RIVAL_BENCHES,
}
