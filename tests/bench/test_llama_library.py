"""llama.cpp's library: what is none is refused. ``ci/bench table`` checks what it computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_edge.bench.players.llama_library import LlamaLibrary
from lora_edge.errors import ProviderError


def test_a_folder_without_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "libllama-common.so").touch()
    with pytest.raises(ProviderError, match=f"^{tmp_path} has no libllama$"):
        LlamaLibrary(tmp_path)


@pytest.mark.parametrize("name", ["libllama.so", "libllama.v0.5.0.so", "libllama.so.0"])
def test_what_is_no_library_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no library")
    with pytest.raises(ProviderError, match=f"{name} cannot be loaded: "):
        LlamaLibrary(tmp_path)
