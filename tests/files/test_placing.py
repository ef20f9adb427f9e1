"""Files at a second place: linked, copied, or their beginning."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from lora_edge.files.hashes import hash_file
from lora_edge.files.placing import place

CONTENT = bytes(range(256)) * (3 << 12)  # some chunks, and a part of one


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(CONTENT[:-100])
    return path


def test_whole_files(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = source.stat().st_size
    place(source, tmp_path / "a" / "linked", link=True, size=size)
    assert os.path.samefile(source, tmp_path / "a" / "linked")
    place(source, tmp_path / "b" / "copied", link=False, size=size)
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("another disk")))
    place(source, tmp_path / "c" / "fallen back", link=True)
    for name in ("b/copied", "c/fallen back"):
        assert not os.path.samefile(source, tmp_path / name)
        assert (tmp_path / name).read_bytes() == CONTENT[:-100]


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 7])
def test_the_beginning_of_a_file(size: int, source: Path, tmp_path: Path) -> None:
    place(source, tmp_path / "beginning", link=True, size=size)
    assert (tmp_path / "beginning").read_bytes() == CONTENT[:size]
    assert source.read_bytes() == CONTENT[:-100]
    assert hash_file(source, size) == hashlib.sha256(CONTENT[:size]).hexdigest()
    assert hash_file(tmp_path / "beginning") == hash_file(source, size)
