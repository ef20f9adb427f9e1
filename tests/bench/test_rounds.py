"""Who takes turns when, what is counted, and who does not compute the same; on clocks made up."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest

from lora_edge.bench.plan import Entry, Figure, Plan, Settings, Taker
from lora_edge.bench.results import results
from lora_edge.bench.rounds import check_alike, run_round
from lora_edge.clients.process import Process
from lora_edge.errors import ParityError
from lora_edge.reports.bench import chart, load_bench, markdown, table

SECONDS = {"off": 2.0, "off again": 2.0, "on": 4.0}
LOGITS = {"off": [1.0, 2.0], "off again": [1.0, 2.0], "on": [1.0, 5.0]}

FIRSTS = {"off": [7, -2.0], "off again": [7, -2.0], "on": [3, -1.0]}


class _Made(Process):
    """A process that only notes what it is told, and whose clock is made up."""

    def __init__(self, entry: Entry, log: list[tuple[str, str]]) -> None:
        self._entry, self._log, self._count = entry.key, log, 0

    def ask(self, do: str, **more: Any) -> Mapping[str, Any]:  # noqa: ARG002
        self._log.append((do, self._entry))
        self._count += 1
        if do == "logits":
            return {"logits": LOGITS[self._entry], "first": FIRSTS[self._entry]}
        if do == "memory":
            return {"pss": 1 << 20, "private": 1 << 19, "peak": 2 << 20}
        slow = 100.0 if do == "steps" and self._count < 5 else 1.0  # the first turns
        seconds = SECONDS[self._entry] * slow
        return {"seconds": seconds, "cpu": 10 * seconds, "since": 1.0, "imports": 0.5}

    def close(self) -> None:
        self._log.append(("close", self._entry))


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_edge.bench.rounds._PAUSE", 0.0)


def _plan(**changes: Any) -> Plan:
    takers = (
        Taker("off", "off", "decode", computes="base"),
        Taker("off again", "off again", "decode", computes="base"),
        Taker("on", "on", "decode", ("a",), computes="adapter a"),
    )
    figure = Figure("decode", "decoding", "tokens/s", takers, tokens=4)
    entries = [Entry(key, "bundle", {}) for key in (*SECONDS, "nobody")]
    return Plan(entries, changes.pop("figures", [figure]), 10, **changes)


def _run(plan: Plan, index: int = 0, **settings: Any) -> tuple[Any, list[tuple[str, str]]]:
    log: list[tuple[str, str]] = []
    costs = run_round(plan, Settings(**settings), index, lambda x: _Made(x, log))
    return costs, log


def test_each_taker_has_each_turn_once_and_the_warm_up_is_not_counted() -> None:
    costs, log = _run(_plan(), steps=6)
    assert costs == {"decode": SECONDS}
    turns = [entry for do, entry in log if do == "steps"]
    assert len(turns) == 3 * (6 + 2)
    rounds = [turns[i : i + 3] for i in range(0, len(turns), 3)]
    assert all(sorted(one) == sorted(SECONDS) for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1  # the order changes
    assert ("open", "nobody") not in log  # no figure needs it
    assert [do for do, _ in log[-3:]] == ["close"] * 3


def test_rounds_differ_in_their_order_and_a_seed_makes_it_again() -> None:
    orders = [
        [entry for do, entry in _run(_plan(), index, steps=4)[1] if do != "logits"]
        for index in (0, 1, 2, 0)
    ]
    assert orders[0] == orders[3]
    assert len({tuple(order) for order in orders}) == 3
    assert _run(_plan(), 0, steps=4, seed=1)[1] != _run(_plan(), 0, steps=4)[1]


def test_the_clock_is_the_one_that_is_asked_for() -> None:
    costs, _ = _run(_plan(), steps=6, clock="cpu")
    assert costs["decode"]["on"] == 40.0


def test_figures_of_one_process_are_asked_for_once() -> None:
    takers = tuple(Taker(name, name, "pss") for name in SECONDS)
    peaks = tuple(Taker(name, name, "peak") for name in SECONDS)
    figures = [
        Figure("pss", "memory", "MiB", takers, rate=False),
        Figure("peak", "peak", "MiB", peaks, rate=False),
    ]
    costs, log = _run(_plan(figures=figures))
    assert costs["pss"]["off"] == 1 << 20
    assert costs["peak"]["off"] == 2 << 20
    assert len([1 for do, _ in log if do == "memory"]) == 3


def test_contestants_that_do_not_compute_the_same_are_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(LOGITS, "off again", [1.0, 2.1])
    with pytest.raises(ParityError, match=r"off( again)? and off( again)? differ by 0\.1"):
        _run(_plan())


def test_the_difference_that_is_allowed_is_a_share_of_the_effect() -> None:
    groups = {"base": {"a": [0.0], "b": [0.009]}, "adapter": {"c": [1.0]}}
    check_alike(groups)
    groups["adapter"]["c"] = [0.1]
    with pytest.raises(ParityError, match="b and a differ"):
        check_alike(groups)
    with pytest.raises(ParityError, match="b and a differ"):
        check_alike({"base": {"a": [1.0], "b": [float("nan")]}})


@pytest.mark.parametrize("first", [[8, -2.0], [7, -2.02], [7, float("nan")]])
def test_who_tells_no_logits_must_choose_the_same_token(
    monkeypatch: pytest.MonkeyPatch, first: list[float]
) -> None:
    monkeypatch.setitem(LOGITS, "off again", [])
    monkeypatch.setitem(FIRSTS, "off again", [7, -2.005])
    _run(_plan())
    monkeypatch.setitem(FIRSTS, "off again", first)
    with pytest.raises(ParityError, match=r"off( again)? chooses token \d .*: they do not run"):
        _run(_plan())


def test_a_tie_for_the_first_token_means_nothing_where_logits_agree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(FIRSTS, "off again", [8, -2.0])
    _run(_plan())


def _measured(rounds: list[dict[str, float]]) -> dict[str, Any]:
    plan = _plan(left_out={"genai": "it is not installed"})
    settings = Settings(processes=len(rounds))
    return results(plan, settings, [{"decode": one} for one in rounds], {"bundle": "b"})


def test_the_reference_stands_for_both_of_its_entries() -> None:
    data = _measured([{"off": 1.0, "off again": 4.0, "on": 1.0}] * 2)
    (figure,) = data["figures"]
    off, again, on = figure["entries"]
    assert off["ratio"] is None
    assert again["ratio"]["value"] == pytest.approx(0.25)
    assert on["ratio"]["value"] == pytest.approx(2.0)  # √(1 · 4) / 1
    assert figure["resolution"] == pytest.approx(3.0)
    assert on["verdict"] == "not resolved"  # twice as fast, where fourfold is not resolved


def test_words_follow_the_resolution() -> None:
    quiet = [
        {"off": 1.0, "off again": 1.01, "on": 1.30},
        {"off": 1.0, "off again": 0.99, "on": 1.31},
        {"off": 1.0, "off again": 1.00, "on": 1.32},
    ]
    (figure,) = _measured(quiet)["figures"]
    assert 0.02 < figure["resolution"] < 0.03
    assert [x["verdict"] for x in figure["entries"]] == ["", "", "slower"]
    near = [{**one, "on": 1.01} for one in quiet]
    assert _measured(near)["figures"][0]["entries"][2]["verdict"] == "not resolved"
    assert _measured(quiet[:1])["figures"][0]["entries"][2]["verdict"] == "not resolved"


def test_the_json_fits_its_schema_and_is_shown_whole(tmp_path: Any) -> None:
    data = _measured([{"off": 1.0, "off again": 1.0, "on": 1.25}] * 3)
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    read = load_bench(file)
    assert read == data
    shown = table(read)
    assert re.search(r"^  on +0\.800 +0\.800 +slower$", shown, re.MULTILINE), shown
    assert "left out: genai: it is not installed" in shown
    assert "| on | 0.800 | 0.800 | slower |" in markdown(read)
    assert "decoding" not in markdown(read, ["files"])
    drawn = chart(read)
    assert drawn.startswith("<svg")
    assert "decoding" in drawn


def test_a_report_that_is_none_is_refused(tmp_path: Any) -> None:
    from lora_edge.errors import DataError

    file = tmp_path / "x.json"
    file.write_text('{"schema_version": 1}', encoding="utf-8")
    with pytest.raises(DataError, match="no report of a benchmark"):
        load_bench(file)
