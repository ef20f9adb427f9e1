"""Large arrays in files without a name: their values, and when their memory is given back."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_edge.files import spilled as module
from lora_edge.files.spilled import by_rows, let_go, moved, spilled
from tests.support.examples import examples

_SMAPS = Path("/proc/self/smaps")
needs_files = pytest.mark.skipif(not module._SPILLS, reason="the system has no such files")
needs_smaps = pytest.mark.skipif(not _SMAPS.is_file(), reason="only Linux tells what is resident")


def _filled(rows: int = 300, columns: int = 1007) -> tuple[np.ndarray, np.ndarray]:
    values = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
    found = spilled(values.shape, values.dtype)
    found[...] = values
    return found, values


def _resident(array: np.ndarray) -> int:
    """Bytes of an array's map that are in memory."""
    address = int(array.__array_interface__["data"][0])
    inside = False
    for line in _SMAPS.read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            begin, _, end = first.partition("-")
            inside = int(begin, 16) <= address < int(end, 16)
        elif inside and first == "Rss:":
            return int(rest[0]) << 10
    raise AssertionError("the array is in no map")


@needs_files
@needs_smaps
def test_what_is_let_go_is_read_again() -> None:
    found, values = _filled()
    assert _resident(found) >= values.nbytes
    let_go(found)
    assert _resident(found) == 0
    assert np.array_equal(found, values)
    assert _resident(found) >= values.nbytes


@needs_files
@needs_smaps
@pytest.mark.parametrize("numbers", examples([1, 5000, 1 << 30], [5000]))
def test_rows_are_let_go_one_part_after_the_other(numbers: int) -> None:
    found, values = _filled()
    other, _ = _filled()
    let_go(found, other)
    seen, most = [], 0
    for part in by_rows(found, other, None, numbers=numbers):
        seen.append(found[part] + other[part])
        most = max(most, _resident(found))
    assert np.array_equal(np.concatenate(seen), values + values)
    assert _resident(found) == _resident(other) == 0
    if numbers == 5000:  # of 4 rows each
        assert len(seen) == 75
        assert most < values.nbytes / 4  # the system reads some pages around those that are wanted


@needs_files
def test_a_map_goes_with_its_last_array() -> None:
    gc.collect()
    before = len(module._found)
    found, values = _filled()
    view = found[5:7]
    del found
    gc.collect()
    assert len(module._found) == before + 1
    let_go(view)
    assert np.array_equal(view, values[5:7])
    del view
    gc.collect()
    assert len(module._found) == before


@needs_files
def test_moved_once() -> None:
    values = np.random.default_rng(0).standard_normal((700, 600))
    found = moved(values)
    assert found is not values
    assert found.dtype == values.dtype
    assert np.array_equal(found, values)
    assert moved(found) is found
    small = values[:3]
    assert moved(small) is small


@needs_files
@pytest.mark.parametrize("why", [errno.ENOSPC, errno.EINVAL])
def test_without_room_it_is_a_plain_array(monkeypatch: pytest.MonkeyPatch, why: int) -> None:
    def full(*_: Any) -> None:
        raise OSError(why, os.strerror(why))

    before = dict(module._found)
    monkeypatch.setattr(os, "posix_fallocate", full)
    found, values = _filled()
    assert module._found == before
    let_go(found)
    assert np.array_equal(found, values)


def test_other_memory_is_left_alone() -> None:
    values = np.random.default_rng(0).standard_normal((700, 600))
    again = values.copy()
    let_go(values, values[3:], values.T, None)
    for part in by_rows(values):
        assert len(values[part])
    assert np.array_equal(values, again)
    assert [len(values[part]) for part in by_rows(values[:0])] == []
