from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lora_edge.files.hashes import hash_file


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_hashes_the_whole_file(tmp_path: Path, size: int) -> None:
    file = tmp_path / "data"
    file.write_bytes(bytes(size))
    assert hash_file(file) == hashlib.sha256(bytes(size)).hexdigest()
