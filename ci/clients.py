"""The table of docs/client-table.md: bundles of every form, validated in every client.

``python ci/clients.py PAGE [CLIENT ...]``: all clients whose environment ci/client has set up, or
those that are named. Rows of the others stay as they are.
"""

from __future__ import annotations

import datetime
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pages import written

import lora_edge
from lora_edge.clients.catalog import kind_of
from lora_edge.errors import LoraEdgeError
from lora_edge.parity.record.golden import recorded
from lora_edge.parity.report import Report
from lora_edge.parity.validate_in import validate_in
from tests.support.adapters import make_adapter
from tests.support.families import make_base
from tests.support.saving import copy_tokenizer

BEGIN, END = "<!-- clients: made by ci/test-clients -->", "<!-- clients: end -->"
ROOT = Path(__file__).parents[1]
MODELS = ROOT / "models"
# Not webgpu: in software it does not pass (docs/clients.md).
_JS = ("node", "web", "transformers.js", "transformers.js-web")
_PYTHONS = ("genai", "openvino-ep", "openvino", "qnn")
# Client -> the name of validate --in, and the environment of ci/client; web's are js.
PLACES: Mapping[str, tuple[str, str]] = {
    "onnxruntime 1.32": ("onnxruntime", ""),
    **{
        f"onnxruntime {name}": ("onnxruntime", f".client-{folder}/bin/python")
        for name, folder in {"1.32, ARM64": "arm64", "1.24": "onnxruntime-1.24"}.items()
    },
    **{name: (name, ".client-js") for name in _JS},
    **{name: (name, f".client-{name}/bin/python") for name in _PYTHONS},
    "fixed shapes, CPU": ("static", ""),
}
ADAPTERS = {name: MODELS / "adapters" / name for name in ("echo", "mirror", "shout")}
HEADS = {name: MODELS / "classifiers" / name for name in ("claims", "letters")}
STEPS = 64  # greedy tokens behind each short prompt of a golden case


class Random(NamedTuple):
    """A small random base, with two adapters.

    Attributes:
        family: model type.
        changes: to its config.
        layers: names of the layers that the first adapter is on; the second is on all.
        adapted: further settings of both adapters.
    """

    family: str
    changes: Mapping[str, Any]
    layers: tuple[str, ...]
    adapted: Mapping[str, Any]

    def made(self, folder: Path) -> tuple[Path, dict[str, Path]]:
        """Write base and adapters."""
        vocabulary = {"vocab_size": 264}  # of the tokenizer that ships
        base = make_base(self.family, folder / "base", **vocabulary, **self.changes)
        copy_tokenizer(base)
        settings = {"few": {"r": 4, "target_modules": [*self.layers]}}
        settings["all"] = {"r": 3, "target_modules": "all-linear"}
        return base, {
            name: make_adapter(base, folder / name, seed, lora_alpha=4, **own, **self.adapted)
            for seed, (name, own) in enumerate(settings.items(), 1)
        }


class Shipped(NamedTuple):
    """A model that ships, and adapters of it."""

    name: str
    adapters: Mapping[str, Path]

    def made(self, folder: Path) -> tuple[Path, Mapping[str, Path]]:  # noqa: ARG002
        """Base and adapters."""
        return MODELS / self.name, self.adapters


LLAMA = Shipped("tiny-llama", ADAPTERS)
# A window that prompts and continuations go beyond.
MISTRAL = Random(
    "mistral", {"sliding_window": 8, "max_position_embeddings": 512}, ("q_proj", "v_proj"), {}
)
GPT2 = Random("gpt2", {"n_positions": 512}, ("c_attn",), {"fan_in_fan_out": True})
BUNDLES: Mapping[str, tuple[Random | Shipped, Mapping[str, Any]]] = {
    "fused": (LLAMA, {}),
    "portable": (LLAMA, {"form": "portable"}),
    "int4": (LLAMA, {"precision": "int4"}),
    "fp16": (LLAMA, {"precision": "fp16"}),
    "merged": (Shipped("tiny-llama", {"echo": ADAPTERS["echo"]}), {"mode": "merged"}),
    "window": (MISTRAL, {}),
    "window portable": (MISTRAL, {"form": "portable"}),
    "gpt2": (GPT2, {}),
    "classifiers": (Shipped("tiny-bert", HEADS), {}),
    # QNN's emulator takes a third of a second for a run of these.
    "fixed shapes": (LLAMA, {"targets": ["qnn"], "seq": 8, "past": 40}),
}


def make_bundle(kind: str, folder: Path) -> Path:
    """Export one of :data:`BUNDLES`; what it is made of lies beside it.

    Raises:
        SystemExit: a golden case has a shorter continuation than the page says.
    """
    source, options = BUNDLES[kind]
    base, adapters = source.made(folder / "source")
    lora_edge.export(base, adapters, output=folder / "bundle", **options)
    bundle = lora_edge.load_bundle(folder / "bundle")
    cases = [case for case in recorded(bundle) if not case.probe.part]
    fewest = min(len(tail) for case in cases for tail in case.tails)
    if bundle.manifest.task == "text-generation" and fewest < STEPS:
        raise SystemExit(f"{kind}: a golden case goes on for {fewest} tokens, expected {STEPS}")
    return folder / "bundle"


def cell(report: Report) -> str:
    """What one client did with one bundle."""
    figures = [case.figures for case in report.cases if case.figures is not None]
    drift = [case.drift for case in report.drift if case.drift is not None]
    exact = [case for case in report.cases if case.kind != "drift"]
    good = sum(case.status == "passed" for case in exact)
    effects = [x.effect_error for x in figures if x.effect_max > 0]
    found = [
        f"{good} of {len(exact)}",
        f"{max(x.logit_error for x in figures):.0e}",
        f"{max(effects, default=0.0):.0e}",
        f"{100 * min(x.top1 for x in figures):.4g} %",
    ]
    if report.drift:
        within = sum(case.status == "passed" for case in report.drift)
        found.append(f"drift {within} of {len(report.drift)}")
        if len(report.sessions) > 1:  # float16 in the client; the figures before are the CPU's
            found[-1] += f" (effect error up to {max(x.effect_error for x in drift):.1e}"
            found[-1] += f", {100 * min(x.top1 for x in drift):.4g} %)"
    if report.sessions[0].left_out:
        found.append(f"{len(report.sessions[0].left_out)} not asked")
    return ("" if report.passed else "**NOT PASSED**: ") + ", ".join(found)


def left_out(client: str, kind: str) -> str | None:
    """Why a client is not asked about a bundle; None: it is."""
    known = kind_of(client)
    static = known is not None and known.static
    return None if static == (kind == "fixed shapes") else ""  # they run one of the two


def row(name: str, bundles: Mapping[str, Path]) -> tuple[list[str], str, int]:
    """A client's cells, what ran there, and how many are not as they should be."""
    client, place = PLACES[name]
    cells, about, wrong = [], "", 0
    for kind, bundle in bundles.items():
        reason = left_out(client, kind)
        if reason is not None:
            cells.append(reason)
            continue
        print(f"{name}: {kind}", file=sys.stderr)
        try:
            report = validate_in({client: str(ROOT / place) if place else None}, bundle)
        except LoraEdgeError as error:
            refused = client == "genai" and kind == "classifiers"
            wrong += not refused
            cells.append("refused: generates no text" if refused else f"**NOT PASSED**: {error}")
            continue
        about = report.sessions[-1].client
        wrong += not report.passed
        cells.append(cell(report))
        for case in report.failures:
            print(f"{name}: {kind}: {case.reason}", file=sys.stderr)
    return cells, about, wrong


def rows_of(page: str) -> dict[str, list[str]]:
    """The cells of the tables on a page, by client; those of both tables one behind the other."""
    found: dict[str, list[str]] = {}
    for line in page.partition(BEGIN)[2].partition(END)[0].splitlines():
        name, *cells = [each.strip() for each in line.strip("|").split("|")]
        if name in PLACES:
            found[name] = [*found.get(name, []), *cells]
    return found


def main(page: Path, wanted: list[str]) -> int:
    """Write the rows of the clients that are wanted; the exit status says whether all passed."""
    there = [name for name, (_, place) in PLACES.items() if not place or (ROOT / place).exists()]
    text = page.read_text(encoding="utf-8")
    kept = {name: x for name, x in rows_of(text).items() if len(x) == len(BUNDLES) + 2}
    day = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        bundles = {kind: make_bundle(kind, Path(folder) / kind) for kind in BUNDLES}
        for name in wanted or there:
            cells, about, wrong = row(name, bundles)
            kept[name] = [*cells, about, day]
            failed += wrong
    lines = {name: kept[name] for name in PLACES if name in kept}
    made = [
        f"{platform.machine()}, Python {platform.python_version()}:",
        "",
        f"| client | {' | '.join(BUNDLES)} |\n|{'---|' * (len(BUNDLES) + 1)}",
        *(f"| {name} | {' | '.join(cells[:-2])} |" for name, cells in lines.items()),
        "",
        "| client | what ran | on |\n|---|---|---|",
        *(f"| {name} | {' | '.join(cells[-2:])} |" for name, cells in lines.items()),
    ]
    page.write_text(written(text, "\n".join(made), BEGIN, END), encoding="utf-8")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
