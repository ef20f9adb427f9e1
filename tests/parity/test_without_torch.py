"""The goldens in a process that has no PyTorch: the same verdicts as here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_edge.base.checkpoint import Base
from lora_edge.bundle.bundle import file_entries, load_bundle
from lora_edge.bundle.onnx_adapter import read_adapter, write_adapter
from lora_edge.exporting.export import export
from lora_edge.parity import validate
from tests.support import shipped
from tests.support.examples import examples

# The runtime install has none of these.
BLOCKED = ("torch", "transformers", "peft", "onnx", "onnx_ir", "onnxscript", "safetensors")
SCRIPT = f"""
import json, sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
from lora_edge.parity import validate
from lora_edge.reports import html, junit, markdown
report = validate(sys.argv[1], repro=sys.argv[2], depth=sys.argv[3])
data = report.to_data()
assert html(data) and junit(data) and markdown(data)
print(json.dumps(data))
"""


@pytest.mark.parametrize(
    ("factor", "depth"),
    [
        pytest.param(1, "full", marks=pytest.mark.long),
        pytest.param(2, "full", marks=pytest.mark.long),
        (2, "normal"),
    ],
)
def test_the_same_verdicts(
    base: Base, adapters: dict[str, Path], tmp_path: Path, factor: int, depth: Any
) -> None:
    directory = tmp_path / "bundle"
    two = {name: adapters[name] for name in ("narrow", "rooted")}
    export(base.directory, two, output=directory, form="portable")
    bundle = load_bundle(directory)
    file = directory / bundle.adapter("rooted").file
    scaled = {
        k: v * np.float32(factor if k.endswith(".B") else 1) for k, v in read_adapter(file).items()
    }
    write_adapter(file, scaled)
    bundle.write_manifest(replace(bundle.manifest, files=file_entries(directory)))
    here = validate(directory, depth=depth, repro=tmp_path / "repro").to_data()
    assert here["passed"] == (factor == 1)
    shutil.rmtree(tmp_path / "repro", ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(directory), str(tmp_path / "repro"), depth],
        capture_output=True,
        text=True,
        check=True,
    )
    there = json.loads(done.stdout)
    for data in (here, there):
        del data["seconds"], data["summary"]
    assert there == json.loads(json.dumps(here))


@pytest.mark.parametrize("option", examples(["--prompts", "--onnx-test-data"], ["--prompts"]))
def test_what_needs_pytorch_says_so(tmp_path: Path, option: str) -> None:
    directory = tmp_path / "bundle"
    export(shipped.BASE, {}, output=directory, sites="adapters")
    (tmp_path / "prompts.txt").write_text("a prompt\n")
    value = tmp_path / ("prompts.txt" if option == "--prompts" else "data")
    script = (
        f"import sys\nfor name in {BLOCKED!r}:\n    sys.modules[name] = None\n"
        f"from lora_edge.cli import main\n"
        f"main(['golden', {str(directory)!r}, {option!r}, {str(value)!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "pip install 'lora-edge[export]'" in done.stderr
    assert "unexpected" not in done.stderr
