"""Does the graph still differ from PyTorch? Needs numpy and onnxruntime, nothing else.

python repro.py [MODEL.onnx]

Feeds ``inputs.npz`` to the graph and compares one position of its output with ``expected.npy``,
what PyTorch gave there; ``columns.npy`` says which columns of the output these are. Exit code 1:
it differs. 0: it agrees. 2: the graph is not there, or does not run.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the import, or it is too late

import numpy as np
import onnxruntime as ort

HERE = Path(__file__).resolve().parent


def main(arguments: list[str]) -> int:
    """Run the graph once and compare."""
    case: dict[str, Any] = json.loads((HERE / "case.json").read_text(encoding="utf-8"))
    graph = Path(arguments[0]) if arguments else HERE / case["graph"]
    if not graph.is_file():
        print(f"{graph} is missing; give the path of the bundle's {case['file']}")
        return 2
    with np.load(HERE / "inputs.npz") as archive:
        inputs = dict(archive)
    expected = np.load(HERE / "expected.npy").astype(np.float64)
    columns = np.load(HERE / "columns.npy")

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, case["optimization"])
    session = ort.InferenceSession(str(graph), options, providers=[case["provider"]])
    (output,) = session.run([case["output"]], inputs)
    logits = output[tuple(case["index"])]

    error = logits[columns].astype(np.float64) - expected
    largest, rms = float(np.abs(error).max()), float(np.sqrt(np.mean(error * error)))
    print(f"{case['case']}: {output.shape} {case['output']} at {case['index']}")
    print(f"best      expected {case['best']}, actual {int(np.argmax(logits))}")
    print(f"max error {largest:.3e}, limit {case['limit']:.3e}")
    print(f"rms error {rms:.3e}, limit {case['rms_limit']:.3e}")
    agrees = largest <= case["limit"] and rms <= case["rms_limit"]  # False for NaN
    print("agrees with PyTorch" if agrees else "DIFFERS from PyTorch")
    return 0 if agrees else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Exception:  # noqa: BLE001  # a traceback's own exit code would say that it differs
        traceback.print_exc()
        sys.exit(2)
