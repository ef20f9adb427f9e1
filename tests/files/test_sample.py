from __future__ import annotations

from pathlib import Path

import pytest

from lora_edge.files.sample import sample_file


def test_any_damage_of_68_kib_shows(tmp_path: Path) -> None:
    file = tmp_path / "data"
    size = 5 * (1 << 20) + 12345
    file.write_bytes(bytes(size))
    clean = sample_file(file)
    for start in (0, 1, 4096, 70_001, size - (68 << 10), size // 2):
        with file.open("r+b") as stream:
            stream.seek(start)
            stream.write(b"\1" * (68 << 10))
        assert sample_file(file) != clean, start
        file.write_bytes(bytes(size))
    assert sample_file(file) == clean
    with file.open("r+b") as stream:  # its limit, and what verify="full" is for
        stream.seek(5000)
        stream.write(b"\1")
    assert sample_file(file) == clean


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 65536, 65537])
def test_every_size_has_a_sample_of_its_own(tmp_path: Path, size: int) -> None:
    file = tmp_path / "data"
    file.write_bytes(bytes(size))
    clean = sample_file(file)
    file.write_bytes(bytes(size + 1))
    assert sample_file(file) != clean
    if size:
        file.write_bytes(bytes(size - 1) + b"\1")  # the last byte is always in it
        assert sample_file(file) != clean
