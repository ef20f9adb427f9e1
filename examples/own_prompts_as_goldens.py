"""Prompts of your own as golden cases: PyTorch answers once, every device checks from then on.

python examples/own_prompts_as_goldens.py BUNDLE      # is copied, and stays as it is

Run from the repository's root. Needs lora-edge[cpu,export]; the check itself needs no PyTorch.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import lora_edge

BASE = "models/tiny-llama"
PROMPTS = [
    {"prompt": "Word: river Answer:", "adapter": "shout"},
    {"prompt": "<|user|>stone<|end|><|assistant|>", "adapter": "mirror"},
]


def main(folder: Path) -> None:
    bundle, prompts = folder / "bundle", folder / "prompts.jsonl"
    shutil.copytree(sys.argv[1], bundle)
    before = {case.name for case in lora_edge.validate(bundle, depth="quick").cases}

    prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS), encoding="utf-8")
    command = [sys.executable, "-m", "lora_edge", "golden", str(bundle), "--prompts", str(prompts)]
    subprocess.run([*command, "--reference", BASE], check=True, stdout=subprocess.DEVNULL)

    report = lora_edge.validate(bundle, depth="quick")
    for case in report.cases:
        if case.name not in before and case.figures is not None:
            print(
                f"{case.name}: {case.status}, error {case.figures.effect_error:.1e} of the effect"
            )
    print(f"{len(report.cases)} cases, {len(before)} before; passed: {report.passed}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
