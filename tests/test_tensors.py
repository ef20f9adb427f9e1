"""The safetensors reader against the safetensors package, and against damage."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lora_edge.tensors import read_bytes, read_float32, read_header

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _raw(file: Path, header: Any, body: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return file


def _record(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("name", DTYPES)
def test_values_are_those_of_the_package(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "wide": torch.randn(3, 5).to(DTYPES[name]),
        "scalar": torch.tensor(-1.5).to(DTYPES[name]),
        "empty": torch.zeros(0, 4).to(DTYPES[name]),
        "special": torch.tensor([0.0, -0.0, float("inf"), float("nan"), 2.0**-14]).to(DTYPES[name]),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    records = read_header(tmp_path / "a.safetensors")
    assert set(records) == set(tensors)
    for key, tensor in tensors.items():
        assert (records[key].dtype, records[key].shape) == (name, tuple(tensor.shape))
        found = read_float32(records[key])
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, tensor.float().numpy())
        assert np.signbit(found).tolist() == np.signbit(tensor.float().numpy()).tolist()


def test_bytes_come_in_chunks_and_whole(tmp_path: Path) -> None:
    tensor = torch.arange(700_000, dtype=torch.float32)
    file = tmp_path / "a.safetensors"
    save_file({"first": torch.ones(3), "large": tensor}, file)
    chunks = list(read_bytes(read_header(file)["large"]))
    assert max(map(len, chunks)) <= 1 << 20
    assert len(chunks) == 3
    assert b"".join(chunks) == tensor.numpy().tobytes()


@pytest.mark.parametrize("dtype", ["I64", "F8_E4M3", "U8", "BOOL"])
def test_a_dtype_that_is_no_float_is_listed_but_not_read(dtype: str, tmp_path: Path) -> None:
    file = _raw(tmp_path / "a", {"x": _record(dtype, [2], 0, 16)}, bytes(16))
    record = read_header(file)["x"]
    assert record.dtype == dtype
    with pytest.raises(ValueError, match=f"{dtype}, expected one of F64, F32, F16, BF16"):
        read_float32(record)


def test_metadata_is_no_tensor(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "x": _record("F32", [2], 0, 8)}
    assert list(read_header(_raw(tmp_path / "a", header, bytes(8)))) == ["x"]


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda file: _raw(file, {}, length=1 << 40), "header of 1099511627776 bytes is cut off"),
        (lambda file: file.write_bytes(b""), "not a whole safetensors file"),
        (lambda file: file.write_bytes(b"PK\x03\x04"), "not a whole safetensors file"),
        (lambda file: _raw(file, b"{not json"), "not a whole safetensors file"),
        (lambda file: _raw(file, b"\xff\xfe"), "not a whole safetensors file"),
        (lambda file: _raw(file, [1, 2]), "not a whole safetensors file"),
        (lambda file: _raw(file, {"x": {"dtype": "F32"}}), "not a whole safetensors file"),
        (lambda file: _raw(file, {"x": _record("F32", [4], 0, 16)}, bytes(15)), "'x' ends at byte"),
        (lambda file: _raw(file, {"x": _record("F32", [4], -8, 8)}, bytes(16)), "cut off"),
        (lambda file: _raw(file, {"x": _record("F32", [4], 8, 0)}, bytes(16)), "cut off"),
        (lambda file: _raw(file, {"x": _record("F32", [3], 0, 16)}, bytes(16)), "has 16 bytes"),
        (lambda file: _raw(file, {"x": _record("BF16", [4], 0, 16)}, bytes(16)), "has 16 bytes"),
        (lambda file: _raw(file, {"x": _record("F32", [-2, -2], 0, 16)}, bytes(16)), "shape"),
    ],
)
def test_damage_is_an_error_that_names_the_file(
    write: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    file = tmp_path / "adapter.safetensors"
    write(file)
    with pytest.raises(ValueError, match=words) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
