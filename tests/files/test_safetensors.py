"""The safetensors reader against the safetensors package, and against damage."""

from __future__ import annotations

import json
import math
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lora_edge.errors import AdapterError
from lora_edge.files import safetensors as reader
from lora_edge.files.safetensors import TensorRecord, read_bytes, read_float32

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_header(file: Path) -> dict[str, TensorRecord]:
    return reader.read_header(file, AdapterError, "Copy it again.")


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


@pytest.mark.parametrize(("dtype", "size"), [("I64", 16), ("F8_E4M3", 2), ("U8", 2), ("BOOL", 2)])
def test_a_dtype_that_is_no_float_is_listed_but_not_read(
    dtype: str, size: int, tmp_path: Path
) -> None:
    file = _raw(tmp_path / "a", {"x": _record(dtype, [2], 0, size)}, bytes(size))
    record = read_header(file)["x"]
    assert record.dtype == dtype
    with pytest.raises(ValueError, match=f"{dtype}, expected one of F64, F32, F16, BF16"):
        read_float32(record)


def test_metadata_is_no_tensor(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "x": _record("F32", [2], 0, 8)}
    assert list(read_header(_raw(tmp_path / "a", header, bytes(8)))) == ["x"]


_OVERLAP = {"x": _record("F32", [2], 0, 8), "y": _record("F32", [1], 4, 8)}
_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda file: _raw(file, {}, length=1 << 40), "header of 1099511627776 bytes is cut off"),
        (lambda file: file.write_bytes(b""), "not a whole safetensors file"),
        (lambda file: file.write_bytes(b"PK\x03\x04"), "not a whole safetensors file"),
        (lambda file: _raw(file, b"{not json"), "not a whole safetensors file"),
        (lambda file: _raw(file, b"\xff\xfe"), "not a whole safetensors file"),
        (lambda file: _raw(file, b"{1: 2}"), "not a whole safetensors file"),
        (lambda file: _raw(file, {"x": {"dtype": "F32"}}), "not a whole safetensors file"),
        (lambda file: _raw(file, {"x": _record("F32", [4], 0, 16)}, bytes(15)), "'x' ends at byte"),
        (lambda file: _raw(file, {"x": _record("F32", [4], -8, 8)}, bytes(16)), "offsets"),
        (lambda file: _raw(file, {"x": _record("F32", [4], 8, 0)}, bytes(16)), "offsets"),
        (lambda file: _raw(file, {"x": _record("F32", [2], 0, 8)}, bytes(9)), "1 bytes follow"),
        (lambda file: _raw(file, {"x": _record("F32", [2], 4, 12)}, bytes(12)), "leaves a hole"),
        (lambda file: _raw(file, _OVERLAP, bytes(8)), "'y' overlaps the one before"),
        (lambda file: _raw(file, {"x": _record("F33", [2], 0, 8)}, bytes(8)), "'F33'.* unknown"),
        (lambda file: _raw(file, {"x": _record("F4", [1], 0, 1)}, bytes(1)), "has 1 bytes"),
        (lambda file: _raw(file, {"x": _record("F32", [1 << 63, 2], 0, 0)}), "has 0 bytes"),
        (lambda file: _raw(file, b" {}"), "does not begin with a brace"),
        (lambda file: _raw(file, b"[]"), "does not begin with a brace"),
        (lambda file: _raw(file, {"__metadata__": {"a": 1}}), "metadata"),
        (lambda file: _raw(file, b'{"x": {}, "x": {}}'), "'x' occurs twice"),
        (lambda file: file.write_bytes(_LFS), "Git LFS pointer"),
        (lambda file: file.mkdir(), "cannot be read"),
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
    with pytest.raises(AdapterError, match=words) as caught:
        read_header(file)
    assert str(file) in str(caught.value)


def _mutants(random: np.random.Generator) -> Iterator[bytes]:
    """Files like those that there are, with a fault of one kind or another."""
    for _ in range(2000):
        header: dict[str, Any] = {}
        end = 0
        for index in range(int(random.integers(0, 4))):
            dtype = str(random.choice(["F32", "F16", "BF16", "I8", "F4", "BOOL", "F64"]))
            shape = [int(x) for x in random.integers(0, 3, int(random.integers(0, 3)))]
            size = math.prod(shape) * reader._BITS[dtype] // 8
            header[f"t{index}"] = _record(dtype, shape, end, end + size)
            end += size
        tensors = list(header.values())
        for _ in range(int(random.integers(0, 2))):
            if tensors:
                one = tensors[int(random.integers(len(tensors)))]
                what = random.integers(8)
                if what < 2:
                    one["data_offsets"][what] += int(random.integers(-2, 5))
                elif what == 2:
                    one["shape"] = [*one["shape"], int(random.choice([0, 1, 2, -1, 1 << 62]))]
                elif what == 3:
                    one["dtype"] = str(random.choice(["F32", "I8", "F8", "f32", ""]))
                elif what == 4:
                    one[str(random.choice(["dtype", "shape", "data_offsets"]))] = random.choice(
                        np.array([None, 1.0, "1", True, [], [0, 0.0], [True, 1], [0, 1, 2]], object)
                    )
                elif what == 5:
                    one.pop(str(random.choice(["dtype", "shape", "data_offsets"])))
                elif what == 6:
                    one["more"] = 1
                else:
                    tensors.reverse()
        if random.integers(8) == 0:
            header["__metadata__"] = random.choice(
                np.array([{}, {"a": "b"}, {"a": 1}, None, [], ""], object)
            )
        text = json.dumps(header).encode()
        text += random.choice(np.array([b"", b"", b"", b" ", b"\n\t ", b"x", b"\0", b"{}"], object))
        body = bytes(max(end + int(random.choice([0, 0, 0, 0, -1, 1, 8])), 0))
        whole = bytearray(struct.pack("<Q", len(text)) + text + body)
        if random.integers(4) == 0:
            whole[int(random.integers(len(whole)))] = int(random.integers(256))
        if random.integers(16) == 0:
            del whole[int(random.integers(len(whole))) :]
        yield bytes(whole)


def test_what_the_package_refuses_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    taken = refused = 0
    for content in _mutants(np.random.default_rng(0)):
        file.write_bytes(content)
        try:
            with safe_open(file, "np") as opened:
                names = set(opened.keys())
        except SafetensorError:
            refused += 1
            with pytest.raises(AdapterError):
                read_header(file)
        else:
            taken += 1
            assert set(read_header(file)) == names, content
    assert min(taken, refused) > 300


def test_many_tensors_are_read_quickly(tmp_path: Path) -> None:
    header = {f"x{index}": _record("F32", [0], 0, 0) for index in range(100_000)}
    file = _raw(tmp_path / "a", header)
    before = time.process_time()
    assert len(read_header(file)) == 100_000
    assert time.process_time() - before < 6
