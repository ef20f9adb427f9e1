from __future__ import annotations

import gc
import threading
from typing import Any

from lora_edge.runtime.resident import ADAPTER, BUFFERS, SizedCache


def filled(limit: int, *sizes: int) -> SizedCache:
    cache = SizedCache(limit)
    for index, size in enumerate(sizes):
        cache.keep((ADAPTER, 0, str(index)), f"value {index}", size)
    return cache


def names(cache: SizedCache) -> list[str]:
    return list(cache.report().adapters)


def test_the_longest_unused_goes_when_the_sizes_exceed_the_limit() -> None:
    cache = filled(100, 40, 40)
    assert cache.get((ADAPTER, 0, "0")) == "value 0"
    cache.keep((ADAPTER, 0, "2"), "value 2", 20)
    assert names(cache) == ["1", "0", "2"]
    cache.keep((ADAPTER, 0, "3"), "value 3", 30)
    assert names(cache) == ["0", "2", "3"]
    assert cache.get((ADAPTER, 0, "1")) is None
    assert cache.report().total == 90


def test_what_is_pinned_stays_and_counts() -> None:
    cache = SizedCache(100)
    cache.pin([(ADAPTER, 0, "0")])
    for index in range(5):
        cache.keep((ADAPTER, 0, str(index)), index, 60)
    assert names(cache) == ["0"]  # and of the others none fits beside it
    assert cache.report().adapters == {"0": 60}


def test_what_was_cleared_is_not_pinned_when_it_comes_again() -> None:
    cache = SizedCache(100)
    cache.pin([(ADAPTER, 0, "0")])
    cache.clear(lambda key: key[1] == 0)
    cache.keep((ADAPTER, 0, "0"), 0, 60)
    cache.keep((ADAPTER, 1, "1"), 1, 60)
    assert names(cache) == ["1"]


def test_what_is_too_large_is_used_and_not_kept() -> None:
    cache = filled(100, 50)
    assert cache.get_or_make((ADAPTER, 0, "big"), lambda: ("made", 101)) == "made"
    assert cache.report().total == 0  # nor can anything stay beside it while it comes
    assert cache.get((ADAPTER, 0, "big")) is None
    assert filled(0, 0).report().adapters == {"0": 0}


def test_the_same_key_again_replaces_its_value() -> None:
    cache = filled(100, 50)
    cache.keep((ADAPTER, 0, "0"), "new", 70)
    assert cache.get((ADAPTER, 0, "0")) == "new"
    assert cache.report().total == 70


def test_one_thread_makes_a_value_while_the_others_wait() -> None:
    cache, made, started = SizedCache(10), [], threading.Barrier(8)

    def make() -> tuple[list[int], int]:
        made.append(1)
        return [len(made)], 1

    found: list[Any] = []

    def run() -> None:
        started.wait()
        found.append(cache.get_or_make(("x",), make))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert all(each is found[0] for each in found)


def test_a_value_that_could_not_be_made_is_made_again() -> None:
    cache, calls = SizedCache(10), []

    def make() -> tuple[str, int]:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("the first time")
        return "value", 1

    for _ in range(2):
        try:
            cache.get_or_make(("x",), make)
        except ValueError:
            continue
    assert cache.get(("x",)) == "value"


def test_making_one_may_ask_for_others() -> None:
    cache = SizedCache(10)
    found = cache.get_or_make(
        ("both",), lambda: (cache.get_or_make(("one",), lambda: ("one", 1)) + " and two", 1)
    )
    assert found == "one and two"
    assert cache.get(("one",)) == "one"


def test_the_best_is_taken_out() -> None:
    cache = SizedCache(1000)
    for length in (300, 100, 200):
        cache.keep((BUFFERS, length), length, length)

    def at_least(key: Any) -> int | None:
        return key[1] if key[1] >= 150 else None

    assert [cache.take(at_least) for _ in range(3)] == [200, 300, None]
    assert cache.report().buffers == 100


def test_what_is_given_back_by_a_finalizer_inside_the_cache_is_not_lost() -> None:
    """A finalizer runs wherever memory is asked for: also where this thread holds the lock."""
    cache = SizedCache(100)

    class Last:
        def __del__(self) -> None:
            cache.give_back((BUFFERS, 1), "buffers", 10)

    def gone(key: Any) -> bool:  # noqa: ARG001
        last.clear()  # under the lock
        gc.collect()
        return False

    last = [Last()]
    cache.keep((ADAPTER, 0, "x"), "x", 1)
    cache.clear(gone)
    assert not last
    assert cache.report().buffers == 10


def test_what_is_given_back_is_bounded_at_once() -> None:
    cache = SizedCache(25)
    for serial in range(5):
        cache.give_back((BUFFERS, serial), serial, 10)
    assert cache._size == 20  # nobody asked for anything since
    assert cache.take(lambda key: 0) == 3  # noqa: ARG005
