"""Export a base and an adapter to one bundle, then run it with and without the adapter.

python examples/export_and_run.py [OUTPUT]       # the bundle's folder, else a temporary one

Run from the repository's root. Needs lora-edge[cpu,export]; takes about half a minute.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import lora_edge

BASE, ADAPTER = "models/tiny-llama", "models/adapters/shout"
PROMPT = "Word: river Answer:"


def main(output: Path) -> None:
    # The export compares the bundle with PyTorch, and publishes it only if they agree.
    bundle = lora_edge.export(BASE, {"shout": ADAPTER}, output=output, progress=print)
    entry = bundle.adapter("shout")
    print(f"\n{output}: {entry.kind} on {len(entry.ranks)} layers, proved: {entry.proved}")

    runner = lora_edge.Runner(output)
    for adapter in (None, "shout"):
        (text,) = runner.generate([PROMPT], adapter=adapter, max_new_tokens=12)
        print(f"{adapter or 'no adapter':<12}{PROMPT}{text}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder) / "bundle")
