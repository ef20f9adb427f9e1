"""Bundles on the native library: the same numbers, wherever a branch is one pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import export_unproved

from lora_edge import Runner
from lora_edge.bundle.bundle import ROWS_GRAPH_FILE, SINGLE_GRAPH_FILE
from lora_edge.errors import BundleError
from lora_edge.runtime import prepared
from lora_edge.runtime.native import library
from lora_edge.runtime.native.library import Native
from tests.support.kinds import make_kinds
from tests.support.native import native
from tests.support.watching import watched_routes

IDS = [[5, 9, 3, 11, 40, 2]]


@pytest.fixture(autouse=True)
def built(monkeypatch: pytest.MonkeyPatch) -> Native:
    """The library, as if it had been built in the user's cache; small bundles are prepared too."""
    found = native()
    monkeypatch.setattr(prepared, "_WORTH", 0)
    monkeypatch.setattr(library, "find", lambda: found)
    return found


def _sums(runner: Runner, adapter: Any, rows: int) -> int:
    """How many native sums a batch's session has."""
    placed = runner.start(adapter, rows, 9).decoder.placement()
    assert placed is not None
    return sum(x for kinds in placed.values() for name, x in kinds.items() if "LoraSum" in name)


def test_one_adapter_and_one_for_each_row(exported: Path, tmp_path: Path) -> None:
    plain = Runner(exported, session_cache=tmp_path, threads=1, native=False)
    runner = Runner(exported, session_cache=tmp_path, threads=1)
    states = [*runner.adapters, None, {x: 0.5 for x in runner.adapters[:2]}]
    off = plain.logits(IDS)
    np.testing.assert_array_equal(runner.logits(IDS), off)
    alone = []
    for state in states:
        own, wanted = runner.logits(IDS, adapter=state), plain.logits(IDS, adapter=state)
        np.testing.assert_allclose(own, wanted, atol=1e-5)
        alone.append(own[0])
        if state is not None:
            assert _sums(runner, state, 1) > 0
            assert np.abs(own - off).max() > 1e-3
    assert _sums(plain, states[0], 1) == 0
    mixed = runner.logits(IDS * len(states), adapter=states)
    assert runner.start(states, len(states), 9).decoder.part.file == ROWS_GRAPH_FILE
    assert _sums(runner, states, len(states)) == _sums(runner, states[0], 1)
    np.testing.assert_allclose(mixed, np.stack(alone), atol=1e-5)
    # A weight is the gate's, which this form has not.
    half = {runner.adapters[0]: 0.5}
    assert _sums(runner, half, 1) == 0
    np.testing.assert_array_equal(runner.logits(IDS, adapter=half), plain.logits(IDS, adapter=half))


def test_text_and_many_tokens(exported: Path, tmp_path: Path) -> None:
    plain = Runner(exported, session_cache=tmp_path, threads=2, native=False)
    runner = Runner(exported, session_cache=tmp_path, threads=2)
    name = runner.adapters[0]
    long = [[(7 * index) % 250 for index in range(60)]]
    np.testing.assert_allclose(
        runner.logits(long, adapter=name), plain.logits(long, adapter=name), atol=1e-5
    )
    assert runner.generate_ids(long, name, 12) == plain.generate_ids(long, name, 12)


def test_few_bits(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """q, k and v, and gate and up, are one sum each."""
    bundle = tmp_path / "b"
    export_unproved(base, adapters, bundle, precision="int4")
    plain = Runner(bundle, session_cache=tmp_path / "cache", native=False)
    runner = Runner(bundle, session_cache=tmp_path / "cache")
    off = plain.logits(IDS)
    for name in runner.adapters:
        own, wanted = runner.logits(IDS, adapter=name), plain.logits(IDS, adapter=name)
        assert np.linalg.norm(own - wanted) <= 0.1 * np.linalg.norm(wanted - off)
    layers = runner.decoder.kept.layers
    assert _sums(runner, name, 1) == 4 * layers
    assert _sums(runner, list(runner.adapters), len(runner.adapters)) == 4 * layers


def test_every_other_kind_stays_as_it_is(tmp_path: Path) -> None:
    names = ("dora", "lora-bias", "plain")
    base, adapters = make_kinds("llama", tmp_path, names)
    bundle = tmp_path / "b"
    export_unproved(base, adapters, bundle)
    plain = Runner(bundle, session_cache=tmp_path / "cache", native=False)
    runner = Runner(bundle, session_cache=tmp_path / "cache")
    for state in (*names, [*names, None]):
        rows = 4 if isinstance(state, list) else 1
        own, wanted = (x.logits(IDS * rows, adapter=state) for x in (runner, plain))
        np.testing.assert_allclose(own, wanted, atol=1e-5)


def test_it_is_compared_once_and_beside_the_other_form(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: Native
) -> None:
    compared = watched_routes(monkeypatch)
    for wanted in (True, False, True):
        runner = Runner(exported, session_cache=tmp_path, native=wanted)
        runner.logits(IDS, adapter=runner.adapters[0])
    assert compared == [f"{SINGLE_GRAPH_FILE} in its {built.form.name} form", SINGLE_GRAPH_FILE]


def test_a_library_that_computes_something_else_is_refused(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: Native
) -> None:
    def swapped(model: bytes) -> bytes:
        """Two layers' factors in each other's place."""
        found = built.form.rewrite(model)
        one, other = (f"layers.{n}.self_attn.o_proj.A".encode() for n in (0, 1))
        assert found.count(one) == found.count(other) > 1
        aside = b"-" * len(one)
        return found.replace(one, aside).replace(other, one).replace(aside, other)

    wrong = Native(built.library, prepared.Form("wrong", swapped))
    monkeypatch.setattr(library, "find", lambda: wrong)
    runner = Runner(exported, session_cache=tmp_path)
    with pytest.raises(BundleError, match="does not give what it gives on the switchable graph"):
        runner.logits(IDS, adapter=runner.adapters[0])


def test_a_library_that_does_not_load_is_told(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: Native
) -> None:
    file = tmp_path / "lora_sum.so"
    file.write_bytes(b"nothing")
    monkeypatch.setattr(library, "find", lambda: Native(file, built.form))
    runner = Runner(exported, session_cache=tmp_path / "cache")
    with pytest.raises(BundleError, match="cannot be loaded") as told:
        runner.logits(IDS, adapter=runner.adapters[0])
    assert "LORA_EDGE_NATIVE=0" in told.value.hint
    runner.logits(IDS)  # the base needs none
