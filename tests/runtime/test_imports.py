from __future__ import annotations

import json
import subprocess
import sys

CODE = """
import json, os, sys
before = set(sys.modules)
import lora_edge
lora_edge.Runner
new = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
ours = sorted(name for name in sys.modules if name.startswith("lora_edge."))
print(json.dumps([new, ours, os.environ["ORT_DISABLE_TELEMETRY"]]))
"""

HEAVY = {"torch", "transformers", "peft", "onnx", "onnx_ir", "onnxscript", "optimum", "safetensors"}


def test_the_runtime_needs_no_training_or_export_packages() -> None:
    out = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    new, ours, telemetry = json.loads(out.stdout)
    assert not HEAVY & set(new)
    assert {"numpy", "onnxruntime", "tokenizers"} <= set(new)
    allowed = {
        "errors",
        "lazy",
        "names",
        "types",
        "files",
        "maths",
        "tasks",
        "base",
        "targets",
        "bundle",
    }
    assert {name.split(".")[1] for name in ours} <= {*allowed, "runtime"}
    assert telemetry == "1"
