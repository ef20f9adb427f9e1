"""What ways of rounding leave of adapters that were trained on floats: exact answers, and bytes.

usage: exact_match.py BASE --adapter NAME=DIR=ROWS … [--way NAME …] [--json FILE]

BASE is a Hugging Face folder, DIR a PEFT folder, ROWS a jsonl file of {"prompt", "completion"} that
the adapter was not trained on. Each way is exported without its proof, and answers greedily.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from made import export_unproved

from lora_edge import Runner

_TOKENS = 24
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "int8": {"precision": "int8"},
    "int4": {"precision": "int4"},
    "int4, exact": {"precision": "int4"},
    "int4, k-quant": {"precision": "int4", "algorithm": "k-quant"},
    "int4, blocks of 16": {"precision": "int4", "block_size": 16},
    "int4, k-quant, blocks of 16": {
        "precision": "int4", "algorithm": "k-quant", "block_size": 16,
    },
}  # fmt: skip


def main(base: Path, adapters: dict[str, tuple[Path, list[dict[str, str]]]], way: str) -> Any:
    """Exact answers of a way, with and without each adapter."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        folders = {name: directory for name, (directory, _) in adapters.items()}
        export_unproved(base, folders, bundle, mode="switchable", **WAYS[way])
        runner = Runner(bundle, session_cache=False, exact=way.endswith("exact"))
        found = {}
        for name, (_, rows) in adapters.items():
            for adapter in (name, None):
                prompts = [row["prompt"] for row in rows]
                answers = runner.generate(prompts, adapter=adapter, max_new_tokens=_TOKENS)
                right = sum(
                    answer.strip() == row["completion"].strip()
                    for answer, row in zip(answers, rows, strict=True)
                )
                found[name if adapter else f"{name}, off"] = {"right": right, "of": len(rows)}
        size = sum(file.stat().st_size for file in (bundle / "onnx").glob("*_data"))
        return {"way": way, "bytes": size, "answers": found}


def _adapter(given: str) -> tuple[str, tuple[Path, list[dict[str, str]]]]:
    name, directory, rows = given.split("=")
    lines = Path(rows).read_text(encoding="utf-8").splitlines()
    return name, (Path(directory), [json.loads(line) for line in lines])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("--adapter", action="append", required=True, help="NAME=DIR=ROWS")
    parser.add_argument("--way", action="append", choices=WAYS, help="default: all")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    made = []
    for each in chosen.way or WAYS:
        made.append(main(chosen.base, dict(map(_adapter, chosen.adapter)), each))
        print(json.dumps(made[-1]), flush=True)
        if chosen.json:
            chosen.json.write_text(json.dumps(made, indent=1))
