"""The capture's peak memory: at most three times the model's bytes, beside the imports' own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

_MAKE = """
import sys
from pathlib import Path
from tests.support.families import make_base
make_base(
    "llama", Path(sys.argv[1]), vocab_size=8192, hidden_size=1024, intermediate_size=4096,
    num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=8, head_dim=64,
)
"""
_MEASURE = """
import json, resource, sys
from pathlib import Path
import onnx, torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM  # what any capture imports
from lora_edge.base.checkpoint import resolve_base
from lora_edge.capture import capture
from lora_edge.capture.trace import trace

def peak():
    # ru_maxrss starts at the parent's own size; VmHWM is this process's.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) << 10 for x in lines if x.startswith("VmHWM"))

imports = peak()
graph = capture(resolve_base(sys.argv[1]), Path(sys.argv[2]), form=sys.argv[3])
print(json.dumps({"imports": imports, "peak": peak(), "seconds": graph.seconds}))
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_peak_is_within_three_times_the_model(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make = [sys.executable, "-W", "ignore", "-c", _MAKE, str(base)]
    subprocess.run(make, check=True, capture_output=True, cwd=ROOT)
    size = (base / "model.safetensors").stat().st_size
    assert size > 180e6
    for form in ("fused", "portable"):
        folder = tmp_path / form
        folder.mkdir()
        measure = [sys.executable, "-W", "ignore", "-c", _MEASURE, str(base), str(folder), form]
        done = subprocess.run(measure, check=True, capture_output=True, text=True)
        figures = json.loads(done.stdout.splitlines()[-1])
        print(f"{form}: model {size / 1e6:.0f} MB, {figures}")
        assert figures["peak"] - figures["imports"] <= 3 * size
        assert (folder / "model.onnx").stat().st_size < 200_000
        assert (folder / "model.onnx_data").stat().st_size < 1.02 * size
