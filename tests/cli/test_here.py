from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnxruntime as ort
import pytest

from lora_edge.cli.here import SMALLEST, Here, here
from lora_edge.errors import ProviderError
from lora_edge.runtime import installed, providers
from lora_edge.targets.clients import GENAI, MOBILE, NODE
from lora_edge.targets.providers import CPU
from lora_edge.targets.table import target
from tests.support.paths import ROOT


def test_the_smallest_graph_is_one() -> None:
    onnx.checker.check_model(onnx.load_from_string(SMALLEST))
    session = ort.InferenceSession(SMALLEST, providers=["CPUExecutionProvider"])
    assert [x.name for x in session.get_inputs()] == ["x"]


def test_the_cpu_runs() -> None:
    assert here(CPU) == Here(True)


def test_a_provider_that_the_wheel_has_not_is_told_with_its_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(providers, "available", lambda: ("cpu",))
    monkeypatch.setattr(installed, "wheels", lambda: {"onnxruntime": "1.32.0"})
    assert here(target("openvino")) == Here(
        False,
        "it is not in the installed onnxruntime 1.32.0",
        "pip uninstall -y onnxruntime; pip install onnxruntime-openvino",
    )


def test_a_provider_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[bytes] = []

    def start(graph: Path, _provider: Any, **_options: Any) -> None:
        opened.append(graph.read_bytes())
        if len(opened) > 1:
            raise ProviderError(f"cuda cannot run {graph}: a library is missing", "Find it.")

    monkeypatch.setattr(providers, "available", lambda: ("cpu", "cuda"))
    monkeypatch.setattr(providers, "resolve", lambda name: name)
    monkeypatch.setattr(providers, "open_session", start)
    assert here(target("cuda")) == Here(True)
    failed = here(target("cuda"))
    assert failed.reason == "cuda cannot run a graph of one node: a library is missing. Find it"
    assert "pip install onnxruntime-gpu" in failed.way
    assert opened == [SMALLEST] * 2


def test_without_onnxruntime_all_is_shown_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libx.so is missing')")
    done = subprocess.run(
        [sys.executable, "-m", "lora_edge", "targets", "cpu"],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "cannot be imported: libx.so is missing" in " ".join(done.stdout.split())
    assert "→ Install it again: pip install --force-reinstall" in done.stdout


def test_clients_in_javascript_need_node_and_their_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    assert here(NODE) == Here(False, "there is no node on the PATH", "install Node")
    monkeypatch.setattr(shutil, "which", lambda _name: "/bin/node")
    found = here(target("transformers.js"))
    assert found.reason == "@huggingface/transformers is not in node_modules of this folder"
    assert found.way == "npm install @huggingface/transformers"
    (tmp_path / "node_modules" / "@huggingface" / "transformers").mkdir(parents=True)
    assert here(target("transformers.js")) == Here(True)


def test_clients_in_python_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime_genai", raising=False)
    module = tmp_path / "onnxruntime_genai.py"
    module.write_text("raise ImportError('libx.so is missing')")
    found = here(GENAI)
    assert (found.runs, found.way) == (False, "pip install onnxruntime-genai")
    assert found.reason == "onnxruntime-genai cannot be imported: libx.so is missing"
    whole = ModuleType("onnxruntime_genai")
    whole.__spec__ = type(sys.__spec__)("onnxruntime_genai", None)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", whole)
    assert here(GENAI) == Here(True)


def test_apps_are_not_run_here() -> None:
    assert here(MOBILE).reason == "it runs in apps, on a device"
