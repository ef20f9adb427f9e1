"""Archives of arrays: within limits, without pickles, every damage a refusal."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from lora_edge.errors import BundleError
from lora_edge.files import arrays
from lora_edge.files.arrays import read_arrays

HINT = "Copy it again."


def _packed(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in members.items():
            packed.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def _saved(array: np.ndarray, **options: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def _header(shape: str, descr: str = "'<f4'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def _read(tmp_path: Path, content: bytes) -> dict[str, np.ndarray]:
    (tmp_path / "x.npz").write_bytes(content)
    return read_arrays(tmp_path / "x.npz", BundleError, HINT)


def test_reads_what_numpy_writes(tmp_path: Path) -> None:
    wanted = {"a": np.arange(6.0).reshape(2, 3), "b": np.array("text"), "c": np.zeros((0, 3))}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **wanted)
        found = read_arrays(tmp_path / "x.npz", BundleError, HINT)
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array)


WHOLE = _packed(a=_saved(np.arange(1000)))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        WHOLE[:-30],
        WHOLE[:60] + b"\xff\x00\xff" + WHOLE[63:],  # zlib.error
        _packed(a=b"no"),
        _packed(a=_saved(np.arange(3))[:-1]),
        _packed(a=_saved(np.array([{}], object), allow_pickle=True)),
        _packed(a=_header("(1000000000, 1000)")),
        _packed(a=_header("(-1,)")),
        _packed(a=_header("(")),
        _packed(a=_header("(1,)", "'O'") + b"\0" * 8),
        _packed(a=b"\x93NUMPY\x09\x00" + b"\0" * 20),
    ],
)
def test_damage_is_a_refusal(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"not a whole \.npz file"):
        _read(tmp_path, content)


def test_what_takes_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "MAX_BYTES", 1 << 20)
    with pytest.raises(BundleError, match="takes more than 1048576 bytes"):
        _read(tmp_path, _packed(a=bytes(2 << 20)))
