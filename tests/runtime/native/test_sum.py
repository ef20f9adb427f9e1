"""The native operator, beside numpy in float64; and how it is built."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lora_edge.errors import MissingDependencyError, ParityError
from lora_edge.runtime.native import build as building
from lora_edge.runtime.native import check, library
from lora_edge.runtime.native.check import (
    LIMIT,
    Sum,
    check_sums,
    expected,
    open_sum,
    random_feeds,
    relative_error,
)
from tests.support.native import native

PAIRS = {
    "one": ((16, 40),),
    "packed": ((8, 64), (8, 16), (8, 16)),
    "unlike ranks": ((16, 96), (0, 32), (33, 20), (1, 5)),
    "nothing": ((0, 24),),
}


@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("by_row", [False, True])
def test_it_is_what_numpy_gives(pairs: tuple[tuple[int, int], ...], by_row: bool) -> None:
    shapes = itertools.product((1, 2, 8), (1, 3, 16, 17, 40), (7, 96, 700))
    cases = [Sum(batch, tokens, inner, pairs, by_row) for batch, tokens, inner in shapes]
    assert check_sums(native().library, cases).cases == 45


def test_the_control_something_else_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Sum(2, 3, 96, PAIRS["packed"], by_row=True)
    feeds = random_feeds(case, 0)
    (found,) = open_sum(native().library, case).run(None, feeds)
    turned = {**feeds, "A0": feeds["A0"][::-1].copy()}
    assert relative_error(found, expected(case, turned), feeds["y"]) > 0.1
    monkeypatch.setattr(check, "expected", lambda *_: expected(case, turned))
    with pytest.raises(ParityError, match="is off by"):
        check_sums(native().library, [case])


def test_no_adapter_changes_no_bit() -> None:
    case = Sum(3, 5, 32, PAIRS["nothing"])
    feeds = random_feeds(case, 1)
    (found,) = open_sum(native().library, case).run(None, feeds)
    np.testing.assert_array_equal(found, feeds["y"])


@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_threads_change_no_bit(tokens: int) -> None:
    case = Sum(4, tokens, 2048, ((64, 512), (16, 100)), by_row=True)
    feeds = random_feeds(case, 2)
    sessions = [open_sum(native().library, case, threads) for threads in (1, 2, 3)]
    (wanted,) = sessions[0].run(None, feeds)
    assert relative_error(wanted, expected(case, feeds), feeds["y"]) <= LIMIT
    for session in sessions[1:]:
        for _ in range(30):
            np.testing.assert_array_equal(session.run(None, feeds)[0], wanted)


def test_several_runs_at_once_on_one_session() -> None:
    case = Sum(1, 1, 2048, ((64, 2048),))
    session = open_sum(native().library, case, 2)
    feeds = [random_feeds(case, seed) for seed in range(4)]

    def run(index: int) -> list[np.ndarray]:
        return [session.run(None, feeds[index])[0] for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        for given, found in zip(feeds, pool.map(run, range(4)), strict=True):
            for value in found:
                assert relative_error(value, expected(case, given), given["y"]) <= LIMIT


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("x", (2, 3, 31), "do not fit together"),
        ("x", (2, 4, 32), "unlike shapes"),
        ("y", (2, 3, 25), "columns of all B"),
        ("A0", (3, 32, 4), "another batch"),
        ("A0", (32,), "neither 2 nor 3"),
        ("B0", (5, 24), "do not fit together"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, shape: tuple[int, ...], said: str) -> None:
    case = Sum(2, 3, 32, ((4, 24),))
    session = open_sum(native().library, case)
    feeds = random_feeds(case, 3)
    with pytest.raises(Exception, match=said):
        session.run(None, {**feeds, name: np.zeros(shape, np.float32)})
    (found,) = session.run(None, feeds)
    assert relative_error(found, expected(case, feeds), feeds["y"]) <= LIMIT


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_EDGE_CACHE", str(tmp_path))
    monkeypatch.delenv(library.SWITCH, raising=False)
    return tmp_path


def _kept() -> Path:
    """The built library, as if it had been built there."""
    file = library.library_file()
    file.parent.mkdir(parents=True)
    file.write_bytes(native().library.read_bytes())
    return file


@pytest.mark.usefixtures("cache")
def test_it_is_found_where_it_was_built_and_for_this_device_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert library.find() is None
    file = _kept()
    found = library.find()
    assert found is not None
    assert found.library == file
    monkeypatch.setenv(library.SWITCH, "0")
    assert library.find() is None
    monkeypatch.delenv(library.SWITCH, raising=False)
    monkeypatch.setattr(library, "processor", lambda: "another")
    assert library.find() is None
    assert library.remove()
    assert not library.remove()


def test_an_older_onnxruntime_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building.ort, "__version__", "1.23.2")
    with pytest.raises(MissingDependencyError, match=r"is 1\.23\.2, .* needs 1\.24 or later"):
        building.build()
    assert list(cache.iterdir()) == []


def test_without_a_compiler_nothing_is_left(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "check_release", lambda: None)
    monkeypatch.setenv("PATH", str(cache))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(MissingDependencyError, match=r"looked for c\+\+, g\+\+, clang\+\+"):
        building.build()
    assert list(cache.iterdir()) == []


def test_a_compiler_that_fails_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "check_release", lambda: None)
    compiler = cache / "compiler"
    compiler.write_text("#!/bin/sh\necho 'x.cc:1: error: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    with pytest.raises(MissingDependencyError, match=r"does not compile .* error: no such thing"):
        building.build(str(compiler))
    assert library.find() is None
    assert list((cache / "native").iterdir()) == []


def test_a_library_that_is_wrong_is_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = cache / "compiler"  # makes what was made before, as its last argument says
    built = native().library
    compiler.write_text(f'#!/bin/sh\nfor last; do :; done\ncp "{built}" "$last"\n')
    compiler.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(check, "LIMIT", 0.0)
        with pytest.raises(ParityError, match="is off by"):
            building.build(str(compiler))
    assert library.find() is None
    file = building.build(str(compiler))
    assert library.find() == library.at(file)
    other = file.parent.parent / "other"
    other.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(check, "LIMIT", 0.0)
        with pytest.raises(ParityError, match="is off by"):
            building.build(str(compiler))
    assert file.is_file()  # the one of before
    building.build(str(compiler))
    assert not other.exists()


def test_no_library_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "check_release", lambda: None)
    compiler = cache / "compiler"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\necho nothing > "$last"\n')
    compiler.chmod(0o755)
    with pytest.raises(ParityError, match="does not run"):
        building.build(str(compiler))
    assert library.find() is None
