"""The reproduction of a failure, run as people run it: without PyTorch, onnx or lora-edge."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_edge.bundle.bundle import Bundle, load_bundle
from lora_edge.bundle.onnx_adapter import read_adapter
from lora_edge.errors import BundleError
from lora_edge.parity.case import Layer
from lora_edge.parity.explain.localise import Divergence
from lora_edge.parity.explain.repro import worst_row, write_repro
from lora_edge.parity.record.golden import Golden, recorded, shortened
from lora_edge.runtime import Runner
from lora_edge.runtime.caches import ConcatenatedCache
from tests.parity.conftest import Made
from tests.support.failing import leak_rows, with_tensor, with_weight

FORMS = ("fused", "portable")
HIDDEN = ("lora_edge", "onnx", "onnx_ir", "peft", "torch", "transformers")


def _golden(bundle: Bundle, case: str) -> Golden:
    found = next(golden for golden in recorded(bundle) if golden.probe.name == case)
    return shortened(found, 4)


def _run(folder: Path, elsewhere: Path, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Run the script where only numpy and onnxruntime can be imported."""
    for name in HIDDEN:
        (elsewhere / name).mkdir(parents=True, exist_ok=True)
        (elsewhere / name / "__init__.py").write_text(f"raise ImportError({name!r})\n")
    return subprocess.run(
        [sys.executable, str(folder / "repro.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=elsewhere,
        env={"PYTHONPATH": str(elsewhere), "PATH": ""},
    )


def _case(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "case.json").read_text())
    return data


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_fault_and_its_repair(form: str, made: Made, tmp_path: Path) -> None:
    good = made.switchable[form]
    name = "lora.model.layers.1.mlp.down_proj.B"
    bundle = with_tensor(good, tmp_path / "out", "rooted", name, np.zeros_like)
    layer = Layer("model.layers.1.mlp.down_proj", float("nan"), 1e-7, 1e-6)
    divergence = Divergence((layer,), layer.path, f"the first layer that differs is {layer.path}")
    golden = _golden(bundle, "adapter rooted")
    folder = write_repro(tmp_path / "repro", Runner(bundle), golden, divergence)
    assert folder == tmp_path / "repro"
    files = {path.name for path in folder.iterdir()}
    assert files == {
        "README.txt", "actual.npy", "case.json", "columns.npy", "expected.npy", "inputs.npz",
        "layers.json", "repro.py",
    }  # fmt: skip
    readme = (folder / "README.txt").read_text()
    assert readme.count("\n") == 5
    assert layer.path in readme
    layers = json.loads((folder / "layers.json").read_text(), parse_constant=pytest.fail)
    assert layers["first"] == layer.path
    assert layers["layers"][0]["error"] is None

    failed = _run(folder, tmp_path / "elsewhere")
    assert failed.returncode == 1, failed.stderr
    assert "DIFFERS from PyTorch" in failed.stdout
    case = _case(folder)
    assert f"best      expected {case['best']}, actual " in failed.stdout
    # The first token is enough to see it.
    assert np.shape(case["tokens"]) == (1, 1)
    inputs = dict(np.load(folder / "inputs.npz"))
    assert all(not array.any() for key, array in inputs.items() if key.startswith("past"))

    tensors = read_adapter(good / load_bundle(good).adapter("rooted").file)
    np.savez(folder / "inputs.npz", **{**inputs, name: tensors[name]})
    repaired = _run(folder, tmp_path / "elsewhere")
    assert repaired.returncode == 0, repaired.stdout
    assert "agrees with PyTorch" in repaired.stdout


@pytest.mark.parametrize("form", FORMS)
def test_a_graph_fault_that_begins_at_one_token(form: str, made: Made, tmp_path: Path) -> None:
    good = made.switchable[form]
    golden = _golden(load_bundle(good), "base")
    row = max(range(4), key=lambda index: len(golden.probe.rows[index]))
    tokens = golden.probe.rows[row]
    place = next(i for i in range(9, len(tokens)) if tokens[i] not in tokens[:i])

    def wrong(weight: np.ndarray) -> np.ndarray:
        weight[tokens[place]] += 0.5
        return weight

    bundle = with_weight(good, tmp_path / "out", "model.embed_tokens.weight", wrong)
    folder = write_repro(tmp_path / "repro", Runner(bundle), golden, row=row)
    assert folder is not None
    case = _case(folder)
    assert case["tokens"] == [list(tokens[: place + 1])]
    assert case["index"] == [0, place]
    assert _run(folder, tmp_path / "elsewhere").returncode == 1
    right = _run(folder, tmp_path / "elsewhere", good / "onnx" / "model.onnx")
    assert right.returncode == 0, right.stdout
    (tmp_path / "damaged.onnx").write_bytes(b"no graph")
    for path in ("missing.onnx", "damaged.onnx"):
        assert _run(folder, tmp_path / "elsewhere", tmp_path / path).returncode == 2
    actual = np.load(folder / "actual.npy")
    expected = np.load(folder / "expected.npy")
    assert actual.shape == expected.shape == np.load(folder / "columns.npy").shape
    assert np.abs(actual - expected).max() > 100 * case["limit"]


def test_a_merged_graph(made: Made, tmp_path: Path) -> None:
    bundle = with_weight(
        made.merged, tmp_path / "out", "lm_head.weight", lambda weight: weight * np.float32(1.01)
    )
    golden = _golden(bundle, "adapter rooted")
    folder = write_repro(tmp_path / "repro", Runner(bundle), golden)
    assert folder is not None
    assert _run(folder, tmp_path / "elsewhere").returncode == 1
    right = made.merged / "onnx" / "model.onnx"
    assert _run(folder, tmp_path / "elsewhere", right).returncode == 0


def test_a_batch_is_kept_where_one_row_alone_is_right(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(made.switchable["portable"])
    golden = _golden(bundle, "mixed rows")
    assert write_repro(tmp_path / "none", Runner(bundle), golden, row=1) is None
    assert not (tmp_path / "none").exists()
    leak_rows(monkeypatch)
    folder = write_repro(tmp_path / "repro", Runner(bundle), golden, row=1)
    assert folder is not None
    case = _case(folder)
    assert case["what"] == "a batch of rows"
    assert case["index"][0] == 1
    assert np.shape(case["tokens"])[0] == len(golden.probe.rows)
    assert _run(folder, tmp_path / "elsewhere").returncode == 1


def test_a_decode_step_is_kept_with_its_past(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = ConcatenatedCache._advance

    def shifted(self: Any, rows: Any, start: Any, every: bool) -> Any:
        return advance(self, rows, [place + 1 if place else 0 for place in start], every)

    monkeypatch.setattr(ConcatenatedCache, "_advance", shifted)
    bundle = load_bundle(made.switchable["portable"])
    golden = _golden(bundle, "adapter rooted")
    folder = write_repro(tmp_path / "repro", Runner(bundle), golden, row=2)
    assert folder is not None
    case = _case(folder)
    assert case["what"] == "one row, with a past"
    assert case["index"] == [0, 0]
    assert _run(folder, tmp_path / "elsewhere").returncode == 1
    # Where PyTorch has that token, the same graph gives what PyTorch gives.
    inputs = dict(np.load(folder / "inputs.npz"))
    assert inputs["past_key_values.0.key"].shape[2] == len(golden.probe.rows[2])
    inputs["position_ids"] -= 1
    np.savez(folder / "inputs.npz", **inputs)
    assert _run(folder, tmp_path / "elsewhere").returncode == 0


def test_the_worst_row(made: Made, tmp_path: Path) -> None:
    good = made.switchable["portable"]
    golden = _golden(load_bundle(good), "base")
    only = [
        next(token for token in row if not any(token in other for other in others))
        for index, row in enumerate(golden.probe.rows)
        for others in [
            [
                *(golden.probe.rows[i] for i in range(4) if i != index),
                *golden.tails,
            ]
        ]
    ]

    def wrong(weight: np.ndarray) -> np.ndarray:
        weight[only[2]] += 0.5
        return weight

    bundle = with_weight(good, tmp_path / "out", "model.embed_tokens.weight", wrong)
    assert worst_row(Runner(bundle), golden) == 2


def test_what_is_replaced_and_what_is_not(made: Made, tmp_path: Path) -> None:
    good = made.switchable["fused"]
    bundle = with_tensor(
        good, tmp_path / "out", "narrow", "lora.model.layers.0.self_attn.q_proj.B", np.negative
    )
    golden, runner = _golden(bundle, "adapter narrow"), Runner(bundle)
    folder = write_repro(tmp_path / "repro", runner, golden)
    assert folder is not None
    (folder / "actual.npy").unlink()
    assert write_repro(tmp_path / "repro", runner, golden) == folder
    assert (folder / "actual.npy").is_file()
    assert not list(tmp_path.glob(".repro*"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match="files that are no reproduction"):
        write_repro(tmp_path / "mine", runner, golden)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_neither_needs_torch_or_onnx_before_it_is_called() -> None:
    code = (
        "import sys, lora_edge.parity.explain.localise, lora_edge.parity.explain.repro\n"
        f"print(sorted(set({HIDDEN[1:]!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
