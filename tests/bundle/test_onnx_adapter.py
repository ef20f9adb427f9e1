from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from lora_edge.bundle.onnx_adapter import parse_adapter
from lora_edge.errors import BundleError
from lora_edge.runtime import read_adapter, write_adapter


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "lora.q.A": rng.standard_normal((7, 3)).astype(np.float32),
        "lora.q.B": rng.standard_normal((3, 5)).astype(np.float32),
        "lora.v.A": np.zeros((7, 0), np.float32),
        "lora.v.B": np.zeros((0, 4), np.float32),
        "lora.q.gate": np.ones((1, 1, 1), np.float32),
    }


def test_round_trip_keeps_every_bit_and_rank_zero(tmp_path: Path) -> None:
    path = tmp_path / "adapter.onnx_adapter"
    write_adapter(path, tensors())
    read = read_adapter(path)
    gc.collect()
    junk = [np.full((7, 3), 9.0, np.float32) for _ in range(1000)]  # would land in freed memory
    assert len(junk) == 1000
    assert list(read) == sorted(tensors())
    for name, value in tensors().items():
        np.testing.assert_array_equal(read[name], value)
        assert read[name].shape == value.shape


def test_views_are_written_in_their_own_order(tmp_path: Path) -> None:
    path = tmp_path / "adapter.onnx_adapter"
    transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_adapter(path, {"lora.q.A": transposed})
    np.testing.assert_array_equal(read_adapter(path)["lora.q.A"], transposed)


def test_onnxruntime_loads_the_file_itself(tmp_path: Path) -> None:
    path = tmp_path / "adapter.onnx_adapter"
    write_adapter(path, tensors())
    ort.LoraAdapter().Load(str(path))


def test_it_reads_what_onnxruntime_reads(tmp_path: Path) -> None:
    path = tmp_path / "adapter.onnx_adapter"
    rng = np.random.default_rng(1)
    shapes = [(1,), (0,), (3, 0, 2), (2, 3, 4), (1, 1, 1, 1), (517, 3)]
    given = {f"näme.{n}": rng.standard_normal(s).astype(np.float32) for n, s in enumerate(shapes)}
    write_adapter(path, given)
    theirs = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
    ours = read_adapter(path)
    assert set(ours) == set(theirs) == set(given)
    for name, value in theirs.items():
        assert ours[name].shape == given[name].shape
        np.testing.assert_array_equal(ours[name], value.numpy().reshape(given[name].shape))


def test_tensors_are_views_of_what_was_read(tmp_path: Path) -> None:
    path = tmp_path / "adapter.onnx_adapter"
    write_adapter(path, tensors())
    content = np.fromfile(path, np.uint8)
    found = parse_adapter(content, "x")
    assert all(np.shares_memory(x, content) for x in found.values() if x.size)
    assert all(x.flags.c_contiguous and x.flags.aligned for x in found.values())


@pytest.mark.parametrize("seed", range(8))
def test_damage_is_an_error_or_other_numbers_and_nothing_else(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "adapter.onnx_adapter"
    write_adapter(path, tensors())
    whole, rng = path.read_bytes(), np.random.default_rng(seed)
    refused = 0
    for _ in range(400):
        content = np.frombuffer(whole, np.uint8).copy()
        for at in rng.integers(0, len(content), rng.integers(1, 4)):
            content[at] = rng.choice([0, 1, 127, 128, 255, rng.integers(0, 256)])
        try:
            found = parse_adapter(content[: rng.integers(len(whole) // 2, len(whole) + 1)], "x")
        except BundleError:
            refused += 1
        else:
            assert all(x.dtype == np.float32 and x.nbytes <= len(whole) for x in found.values())
    assert refused > 40


def test_a_parameter_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter.onnx_adapter"
    write_adapter(path, {"lora.p.A": np.ones((2, 2), np.float32), "lora.q.A": np.zeros((2, 2))})
    path.write_bytes(path.read_bytes().replace(b"lora.q.A", b"lora.p.A"))
    with pytest.raises(BundleError, match=r"damaged: lora\.p\.A is there twice"):
        read_adapter(path)


@pytest.mark.parametrize("kept", [0, 3, 7, 8, 20, 0.5])
def test_a_cut_off_file_is_refused(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "adapter.onnx_adapter"
    write_adapter(path, tensors())
    content = path.read_bytes()
    path.write_bytes(content[: int(kept if kept >= 1 else kept * len(content))])
    with pytest.raises(BundleError) as error:
        read_adapter(path)
    assert str(path) in str(error.value)
    assert error.value.hint


def test_other_files_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter.onnx_adapter"
    with pytest.raises(BundleError, match="cannot be read"):
        read_adapter(path)
    path.write_bytes(b"PK\x03\x04 not an adapter")
    with pytest.raises(BundleError, match=r"is not an \.onnx_adapter file"):
        read_adapter(path)


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter.onnx_adapter"
    value = ort.OrtValue.ortvalue_from_numpy(np.ones((2, 2), np.float16))
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({"lora.q.A": value})
    adapter.export_adapter(str(path))
    with pytest.raises(BundleError, match=r"lora\.q\.A is float16, expected float32"):
        read_adapter(path)


def test_writing_into_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be written"):
        write_adapter(tmp_path / "missing" / "adapter.onnx_adapter", tensors())


def test_a_file_that_the_disk_has_no_room_for_is_an_error(tmp_path: Path) -> None:
    """ONNX Runtime writes it; a short write must not pass for a whole one."""
    path = tmp_path / "adapter.onnx_adapter"
    script = (
        "import resource, sys; from pathlib import Path; import numpy as np\n"
        "from lora_edge.errors import BundleError; from lora_edge.runtime import write_adapter\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "try: write_adapter(Path(sys.argv[1]), {'x': np.ones((99, 99), np.float32)})\n"
        "except BundleError as error: print(error, '|', error.hint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == (
        f"{path} cannot be written whole | Check the folder and the disk space."
    )
