"""The table of docs/client-table.md: bundles of every form, validated in every client.

``python ci/clients.py PAGE [CLIENT ...]``: all clients whose environment ci/client has set up, or
those that are named.
"""

from __future__ import annotations

import datetime
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pages import written

import lora_edge
from lora_edge.errors import LoraEdgeError
from lora_edge.parity.report import Report
from lora_edge.parity.validate_in import validate_in

BEGIN, END = "<!-- clients: made by ci/test-clients -->", "<!-- clients: end -->"
ROOT = Path(__file__).parents[1]
MODELS = ROOT / "models"
# Client -> the name of validate --in, and the environment of ci/client; web's are js.
PLACES: Mapping[str, tuple[str, str]] = {
    "onnxruntime 1.32": ("onnxruntime", ""),
    "onnxruntime 1.24": ("onnxruntime", ".client-onnxruntime-1.24/bin/python"),
    "genai": ("genai", ".client-genai/bin/python"),
    "node": ("node", ".client-js"),
    "web": ("web", ".client-js"),
    "transformers.js": ("transformers.js", ".client-js"),
    "openvino-ep": ("openvino-ep", ".client-openvino-ep/bin/python"),
    "openvino": ("openvino", ".client-openvino/bin/python"),
}
ADAPTERS = {name: MODELS / "adapters" / name for name in ("echo", "mirror", "shout")}
HEADS = {name: MODELS / "classifiers" / name for name in ("claims", "letters")}
BUNDLES: Mapping[str, tuple[str, Mapping[str, Path], Mapping[str, Any]]] = {
    "fused": ("tiny-llama", ADAPTERS, {}),
    "portable": ("tiny-llama", ADAPTERS, {"form": "portable"}),
    "int4": ("tiny-llama", ADAPTERS, {"precision": "int4"}),
    "fp16": ("tiny-llama", ADAPTERS, {"precision": "fp16"}),
    "merged": ("tiny-llama", {"echo": ADAPTERS["echo"]}, {"mode": "merged"}),
    "classifiers": ("tiny-bert", HEADS, {}),
}


def cell(report: Report) -> str:
    """What one client did with one bundle."""
    figures = [case.figures for case in report.cases if case.figures is not None]
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
    if report.sessions[0].left_out:
        found.append(f"{len(report.sessions[0].left_out)} not asked")
    return ("" if report.passed else "**NOT PASSED**: ") + ", ".join(found)


def main(page: Path, wanted: list[str]) -> int:
    """Write the table; the exit status says whether all passed."""
    chosen = {name: PLACES[name] for name in wanted or PLACES}
    rows, about, wrong = [], {}, 0
    with tempfile.TemporaryDirectory() as folder:
        for kind, (base, adapters, options) in BUNDLES.items():
            lora_edge.export(MODELS / base, adapters, output=Path(folder) / kind, **options)
        for name, (client, place) in chosen.items():
            cells = []
            for kind in BUNDLES:
                print(f"{name}: {kind}", file=sys.stderr)
                try:
                    where = str(ROOT / place) if place else None
                    report = validate_in({client: where}, Path(folder) / kind)
                except LoraEdgeError as error:
                    refused = client == "genai" and kind == "classifiers"
                    wrong += not refused
                    said = "refused: generates no text" if refused else f"**NOT PASSED**: {error}"
                    cells.append(said)
                    continue
                about[name] = report.sessions[0].client
                wrong += not report.passed
                cells.append(cell(report))
                for case in report.failures:
                    print(f"{name}: {kind}: {case.reason}", file=sys.stderr)
            rows.append(f"| {name} | {' | '.join(cells)} |")
    head = f"| client | {' | '.join(BUNDLES)} |\n|{'---|' * (len(BUNDLES) + 1)}"
    ran = "\n".join(f"| {name} | {said} |" for name, said in about.items())
    day = datetime.datetime.now(tz=datetime.timezone.utc).date()
    made = "\n".join(
        [f"{day}, {platform.machine()}, Python {platform.python_version()}:", "", head, *rows, "",
         "| client | what ran |\n|---|---|", ran]
    )  # fmt: skip
    text = page.read_text(encoding="utf-8")
    page.write_text(written(text, made, BEGIN, END), encoding="utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
