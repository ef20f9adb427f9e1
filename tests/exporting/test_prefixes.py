"""What is kept of a prompt serves all graphs of a bundle, and no pinned session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_edge
from lora_edge import Runner
from lora_edge.bundle.bundle import (
    BASE_GRAPH_FILE,
    GRAPH_FILE,
    ROWS_GRAPH_FILE,
    SINGLE_GRAPH_FILE,
)
from lora_edge.runtime import prepared
from lora_edge.runtime.decoding import Chunk, Decoding
from lora_edge.runtime.sampling import Sampling
from tests.support.kinds import make_kinds

INVOCATION = [7, 9, 11]
LIMIT = 1e-5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prefixes")
    base, adapters = make_kinds("llama", root, ("alora", "plain"))
    return lora_edge.export(base, adapters, output=root / "out").directory


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Which graph ran how many tokens of each row, but for steps in place."""
    found: list[tuple[str, tuple[int, ...]]] = []
    plain = Decoding._run

    def run(self: Any, io: Any, chunk: Chunk, every: bool) -> Any:
        found.append((self.decoder.part.file, tuple(chunk.counts)))
        return plain(self, io, chunk, every)

    monkeypatch.setattr(prepared, "_WORTH", 0)
    monkeypatch.setattr(Decoding, "_run", run)
    return found


def _logits(runner: Runner, rows: list[list[int]], adapter: Any) -> np.ndarray:
    generation = runner._generation(rows, adapter, (Sampling(), 1), None)
    return generation._decoding.prefill(rows).copy()


def _prompt(seed: int) -> list[int]:
    found = np.random.default_rng(seed).integers(12, 200, 24).tolist()
    assert len(found) == 24
    return [int(token) for token in found]


def test_graphs_of_a_bundle_share_what_is_kept(made: Path, tmp_path: Path, ran: list[Any]) -> None:
    runner = Runner(made, session_cache=tmp_path, threads=1, prefix_bytes=1 << 20)
    plain = Runner(made, session_cache=False, threads=1)
    row = _prompt(0)
    invoked = [*row, *INVOCATION, 44, 8]
    cases: list[Any] = [
        ([row], None, [(BASE_GRAPH_FILE, (24,))]),
        ([invoked], "alora", [(GRAPH_FILE, (13,))]),
        ([row], "plain", [(SINGLE_GRAPH_FILE, (24,))]),
        ([row] * 2, ["plain", None], [(GRAPH_FILE, (8,)), (GRAPH_FILE, (8,))]),
        ([row] * 2, ["plain", {"plain": 0.5}], [(ROWS_GRAPH_FILE, (24, 24))]),
        ([row, invoked], ["plain", "alora"], [(GRAPH_FILE, (24,)), (GRAPH_FILE, (13,))]),
    ]
    for rows, adapter, expected in cases:
        runner.start(adapter, len(rows), 1)  # opened, and compared
        ran.clear()
        found = _logits(runner, rows, adapter)
        assert ran == expected
        np.testing.assert_allclose(found, _logits(plain, rows, adapter), rtol=0, atol=LIMIT)
        ran.clear()
        again = _logits(runner, rows, adapter)
        np.testing.assert_allclose(again, found, rtol=0, atol=LIMIT)
        assert max(max(counts) for _, counts in ran) <= 15
        said = runner.generate_ids(rows, adapter, 20)
        assert said == plain.generate_ids(rows, adapter, 20)
    effect = _logits(plain, [row], "plain") - _logits(plain, [row], None)
    assert np.abs(effect).max() > 100 * LIMIT


def test_a_pinned_session_shares_nothing(made: Path, ran: list[Any]) -> None:
    runner = Runner(
        made, session_cache=False, threads=1, pinned=["plain", None], prefix_bytes=1 << 20
    )
    row = _prompt(1)
    for adapter in ("plain", None):
        runner.start(adapter, 1, 1)
    ran.clear()
    for adapter in ("plain", None, ["plain", None], "plain", None, ["plain", None]):
        _logits(runner, [row] * (2 if isinstance(adapter, list) else 1), adapter)
    base = BASE_GRAPH_FILE
    assert ran == [
        *((base, (24,)), (base, (24,)), (GRAPH_FILE, (24, 24))),
        *((base, (8,)), (base, (8,)), (GRAPH_FILE, (8,)), (GRAPH_FILE, (8,))),
    ]
