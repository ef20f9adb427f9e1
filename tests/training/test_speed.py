"""The trainer's benchmark: ratios of tokens/s, and that contestants do the same work."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.modules import load_file
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_file("bench_train", ROOT / "ci" / "benchmarks" / "train.py")


def rounds(bench: Any) -> list[dict[str, Any]]:
    names = [bench.REFERENCE, bench.AGAIN, *bench.OURS, bench.FULL]
    speeds = ((100.0, 100.0, 120.0), (100.0, 121.0, 132.0))
    return [
        {
            name: bench.Run(1.0, {0: first, 1: again}.get(place, ours), 1 << 20, 2.0, 10, 5)
            for place, name in enumerate(names)
        }
        for first, again, ours in speeds
    ]


def test_a_ratio_is_over_both_entries_of_the_reference(bench: Any) -> None:
    found = bench.ratio(rounds(bench), "lora-edge")
    assert found.value == pytest.approx(1.2)  # 120 over 100, and 132 over 110
    assert (found.low, found.high) == pytest.approx((1.2, 1.2))
    assert bench.ratio(rounds(bench), bench.AGAIN).value == pytest.approx(1.1)
    assert ">= 1: 1.200" in bench.table(rounds(bench))


def test_another_loss_is_other_work(bench: Any) -> None:
    one = rounds(bench)[0]
    bench.check(one)
    one["lora-edge"] = bench.Run(1.0, 120.0, 1 << 20, 2.1, 10, 5)
    with pytest.raises(RuntimeError, match=r"lora-edge ends at loss 2\.1"):
        bench.check(one)


@pytest.mark.long
def test_both_ways_train_the_same_and_are_measured(bench: Any, tmp_path: Path) -> None:
    data = bench.make_data(tmp_path)
    base = ROOT / "models" / "tiny-llama"
    plain, ours = (
        bench.measure(name, base, data, 5, False) for name in (bench.REFERENCE, "lora-edge")
    )
    assert ours.loss == pytest.approx(plain.loss, rel=1e-3)
    assert ours.trainable == plain.trainable > 0
    assert min(plain.tokens_per_second, ours.tokens_per_second, plain.seconds, ours.seconds) > 0
    assert ours.written_bytes > 0
