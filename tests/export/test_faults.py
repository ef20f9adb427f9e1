# ruff: noqa: ARG001  every fault takes the same arguments
"""Bundles broken on purpose, with their hashes made right again: the numbers must tell."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import lora_edge
from lora_edge.cli import main
from lora_edge.runtime.adapter_file import read_adapter, write_adapter

Tensors = dict[str, np.ndarray]


def _doubled(tensors: Tensors, other: Tensors) -> Tensors:
    return {k: v * np.float32(2) if k.endswith(".B") else v for k, v in tensors.items()}


def _of_another_adapter(tensors: Tensors, other: Tensors) -> Tensors:
    return other


def _one_site_zeroed(tensors: Tensors, other: Tensors) -> Tensors:
    site = next(k for k, v in tensors.items() if k.endswith(".B") and v.any())
    return {k: v * np.float32(0) if k == site else v for k, v in tensors.items()}


def _zeroed(tensors: Tensors, other: Tensors) -> Tensors:
    return {k: v * np.float32(0) if k.endswith(".B") else v for k, v in tensors.items()}


def _plain_scaling_for_rslora(tensors: Tensors, other: Tensors) -> Tensors:
    scale = np.float32(1 / math.sqrt(16))
    return {k: v * scale if k.endswith(".B") else v for k, v in tensors.items()}


FAULTS: list[tuple[str, Callable[[Tensors, Tensors], Tensors], str]] = [
    ("plain", _doubled, "times PyTorch's effect"),
    ("plain", _of_another_adapter, ""),
    ("pattern", _one_site_zeroed, ""),
    ("plain", _zeroed, "does nothing"),
    ("rs", _plain_scaling_for_rslora, ""),
]


@pytest.mark.parametrize("live", [True, False], ids=["reference", "goldens"])
@pytest.mark.parametrize(
    ("name", "fault", "explanation"), FAULTS, ids=[fault.__name__ for _, fault, _ in FAULTS]
)
def test_fault_is_found_and_its_adapter_named(
    name: str,
    fault: Callable[[Tensors, Tensors], Tensors],
    explanation: str,
    live: bool,
    bundle: Path,
    base: Path,
    resign: Callable[[Path], None],
) -> None:
    file = bundle / "adapters" / name / "adapter.onnx_adapter"
    other = bundle / "adapters" / "rs" / "adapter.onnx_adapter"
    write_adapter(file, fault(read_adapter(file), read_adapter(other)))
    resign(bundle)
    report = lora_edge.validate(bundle, reference=base if live else None)
    assert not report.passed
    alone = next(case for case in report.failures if case.name == f"adapter {name}")
    assert name in alone.reason
    assert explanation in alone.reason


def test_command_exits_with_1_and_names_the_adapter(
    bundle: Path, resign: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    file = bundle / "adapters" / "plain" / "adapter.onnx_adapter"
    write_adapter(file, _doubled(read_adapter(file), {}))
    resign(bundle)
    with pytest.raises(SystemExit) as stopped:
        main(["validate", str(bundle)])
    assert stopped.value.code == 1
    assert "failed: adapter plain" in capsys.readouterr().out


def test_damage_without_new_hashes_is_an_integrity_error(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bundle / "onnx" / "model.onnx_data"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(SystemExit) as stopped:
        main(["validate", str(bundle)])
    assert stopped.value.code == 2
    assert "model.onnx_data" in capsys.readouterr().err
