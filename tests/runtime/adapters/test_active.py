from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import onnx
import pytest

from lora_edge.bundle.bundle import Bundle, file_entry
from lora_edge.errors import AdapterNotFoundError, BundleError, DataError
from lora_edge.runtime import Runner, read_adapter, write_adapter
from lora_edge.runtime.adapters.active import ActiveAdapters
from lora_edge.runtime.adapters.binding import Tensors
from lora_edge.runtime.resident import SizedCache

FORMS = ["fused", "portable", "foreign"]
LIMIT = 1e-5


def active(bundle: Bundle, cache: SizedCache | None = None, **options: Any) -> ActiveAdapters:
    return ActiveAdapters(bundle, Tensors(bundle.manifest.sites, **options), cache)


@pytest.mark.parametrize("form", FORMS)
def test_switching_there_and_back_is_bit_for_bit(
    tiny: Any, runners: dict[str, Runner], form: str
) -> None:
    runner, rows = runners[form], tiny.rows(9, 4)
    first = runner.logits(rows, adapter="alpha")
    other = runner.logits(rows, adapter="beta")
    runner.logits(rows, adapter={"alpha": 0.5, "beta": 1.0})
    runner.logits(rows, adapter=["alpha", "beta"])
    np.testing.assert_array_equal(runner.logits(rows, adapter="alpha"), first)
    assert np.abs(first - other).max() > 0.5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("off", [None, "none", {}, {"none": 2.0}, {"alpha": 0.0}, [None, "none"]])
def test_off_is_the_base_graph_bit_for_bit(
    tiny: Any, runners: dict[str, Runner], tmp_path: Path, form: str, off: Any
) -> None:
    graph = tmp_path / "base.onnx"
    onnx.save(tiny.graph(form, sites=False), graph)
    rows = tiny.rows(9, 9)
    base = tiny.decoder(graph, form, sites=False, threads=1).start(2, 9).extend_all(rows)
    np.testing.assert_array_equal(runners[form].logits(rows, adapter=off), np.stack(base))
    assert np.abs(runners[form].logits(rows, adapter="beta") - np.stack(base)).max() > 0.5


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_mixed_batch_are_what_each_is_alone(
    tiny: Any, runners: dict[str, Runner], form: str
) -> None:
    runner, rows = runners[form], tiny.rows(9, 4, 7, 1, 9, 3, 5, 2)
    blend = {"alpha": 0.5, "beta": -1.0}
    states: list[Any] = ["alpha", "beta", None, "readout", blend, "alpha", {"beta": 2.0}, "none"]
    mixed = runner.logits(rows, adapter=states)
    worst = neighbour = 0.0
    for index, (row, state) in enumerate(zip(rows, states, strict=True)):
        alone = runner.logits([row], adapter=state)[0]
        worst = max(worst, np.abs(mixed[index, : len(row)] - alone).max())
        assert not mixed[index, len(row) :].any()
        if index:
            other = runner.logits([row], adapter=states[index - 1])[0]
            neighbour = max(neighbour, np.abs(mixed[index, : len(row)] - other).max())
    assert worst <= LIMIT
    assert neighbour > 0.5


def test_a_blend_is_the_weighted_sum_of_effects(tiny: Any, runners: dict[str, Runner]) -> None:
    # On the last linear alone effects add up exactly; the reference covers the nonlinear ones.
    runner, rows = runners["fused"], tiny.rows(6)
    base = runner.logits(rows).astype(np.float64)
    effects = {
        name: runner.logits(rows, adapter=name) - base for name in ("readout", "alpha", "beta")
    }
    for weight in (0.5, -2.0):
        scaled = runner.logits(rows, adapter={"readout": weight}) - base
        np.testing.assert_allclose(scaled, weight * effects["readout"], atol=LIMIT)
    beta_then_readout = runner.logits(rows, adapter={"beta": 1.0, "readout": 0.7})
    whole = tiny.reference("fused", rows[0], {"beta": 1.0, "readout": 0.7})
    np.testing.assert_allclose(beta_then_readout[0], whole, atol=2e-5)
    assert np.abs(beta_then_readout - base - effects["beta"]).max() > 0.05


def test_order_of_a_blend_does_not_matter(tiny: Any, runners: dict[str, Runner]) -> None:
    rows = tiny.rows(6)
    one = runners["fused"].logits(rows, adapter={"alpha": 0.5, "beta": 1.5})
    two = runners["fused"].logits(rows, adapter={"beta": 1.5, "alpha": 0.5})
    np.testing.assert_array_equal(one, two)


def test_rows_alike_take_the_plain_path_without_copies(bundle: Bundle) -> None:
    adapters = active(bundle)
    path = next(iter(bundle.manifest.adapters["alpha"].ranks))
    name = f"lora.{path}.A"
    one, two = adapters.binding("alpha", 1), adapters.binding({"alpha": 0.25}, 3)
    rows = adapters.binding(["alpha", {"alpha": 1.0}, {"alpha": 1, "beta": 0}], 3)
    assert one.values[name] is two.values[name] is rows.values[name]
    assert one.values[name].data_ptr() == adapters.changes("alpha")[path].factors.A.ctypes.data
    assert rows.batch is None
    gate = two.values[f"lora.{path}.gate"]
    assert gate.numpy().tolist() == [[[0.25]]]
    assert len({id(v) for k, v in two.values.items() if k.endswith(".gate")}) == 1
    untouched = [k for k, v in one.values.items() if k.endswith(".A") and v.shape()[1] == 0]
    assert "lora.lm_head.A" in untouched


def test_mixed_rows_share_factors_and_gates(tiny: Any, bundle: Bundle) -> None:
    adapters = active(bundle)
    one = adapters.binding(["alpha", "beta", None], 3)
    two = adapters.binding(["beta", None, "alpha"], 3)
    q0, v0 = "lora.model.layers.0.self_attn.q_proj", "lora.model.layers.0.self_attn.v_proj"
    v1 = "lora.model.layers.1.self_attn.v_proj"
    assert one.batch == 3
    assert one.values[f"{q0}.A"] is two.values[f"{q0}.A"]
    assert one.values[f"{q0}.A"].shape() == [32, 5]
    assert one.values[f"{v0}.gate"] is one.values[f"{v1}.gate"]
    expected = [[[1, 1, 1, 0, 0]], [[0, 0, 0, 1, 1]], [[0] * 5]]
    assert one.values[f"{q0}.gate"].numpy().tolist() == expected
    row = one.row(1)
    assert row.values[f"{q0}.gate"].numpy().tolist() == expected[1:2]
    assert row.values[f"{q0}.A"] is one.values[f"{q0}.A"]
    assert row.states == ((("beta", 1.0),),)
    assert set(one.values) == set(tiny.tensors({}))


def test_providers_without_zero_ranks_get_zeros_of_rank_one(
    tiny: Any, bundle: Bundle, bundles: dict[str, Any]
) -> None:
    adapters = active(bundle, zero_rank=False)
    for state in (None, "alpha", ["alpha", None]):
        binding = adapters.binding(state, 2)
        assert all(0 not in value.shape() for value in binding.values.values())
    decoder = tiny.decoder(bundles["fused"].directory / "onnx/model.onnx", "fused")
    rows = tiny.rows(5, 5)
    logits = decoder.start(2, 5, adapters.binding(["beta", None], 2)).extend_all(rows)
    for row, state in enumerate(({"beta": 1.0}, {})):
        expected = tiny.reference("fused", rows[row], state)
        np.testing.assert_allclose(logits[row], expected, atol=2e-5)


def test_the_last_used_are_kept_within_the_bytes(bundle: Bundle) -> None:
    cache = SizedCache(100_000)
    adapters = active(bundle, cache=cache)
    name = "lora.lm_head.A"

    def blend(weight: float) -> Any:
        return adapters.binding({"alpha": 1.0, "beta": weight}, 1).values[name]

    values = [blend(float(n)) for n in range(1, 40)]
    report = cache.report()
    assert 50_000 < report.total <= report.limit
    assert report.combined > 0
    assert blend(39.0) is values[-1]
    again = blend(1.0)
    assert again is not values[0]  # made again, and equal
    np.testing.assert_array_equal(again.numpy(), values[0].numpy())


def test_the_same_state_is_the_same_binding(bundle: Bundle) -> None:
    adapters = active(bundle)
    states: list[tuple[Any, int]] = [
        *[(None, 1), ("alpha", 1), ({"alpha": 0.5}, 1), ({"alpha": 1.0, "beta": 1.0}, 1)],
        (["alpha", None], 2),
    ]
    first = [adapters.binding(*state) for state in states]
    assert [adapters.binding(*state) for state in states] == first  # by identity
    assert len(set(first)) == len(first)
    assert adapters.binding([None, "alpha"], 2) not in first


def many(tiny: Any, bundle: Bundle, count: int) -> Bundle:
    """A bundle of so many adapters, each a multiple of one that the reference knows."""
    entries, files = dict(bundle.manifest.adapters), dict(bundle.manifest.files)
    for index in range(count):
        file = f"adapters/n{index}/adapter.onnx_adapter"
        (bundle.directory / file).parent.mkdir(parents=True)
        tensors = tiny.tensors(tiny.adapters["beta"])
        scaled = {
            k: v * np.float32(0.25 + index % 4) if k.endswith(".B") else v
            for k, v in tensors.items()
        }
        write_adapter(bundle.directory / file, scaled)
        entries[f"n{index}"] = replace(entries["beta"], name=f"n{index}", file=file)
        files[file] = file_entry(bundle.directory / file)
    return Bundle(bundle.directory, replace(bundle.manifest, adapters=entries, files=files))


def test_hundreds_of_adapters_in_little_memory(tiny: Any, bundle: Bundle) -> None:
    whole = many(tiny, bundle, 300)
    runner = Runner(whole, threads=1, cache_bytes=150_000, keep=["n7"])
    rows, held = tiny.rows(6), set()
    expected = [runner.logits(rows, adapter={"beta": 0.25 + index}) for index in range(4)]
    for index in [*range(300), *range(0, 300, 50)]:
        found = runner.logits(rows, adapter=f"n{index}")
        np.testing.assert_allclose(found, expected[index % 4], atol=LIMIT)
        report = runner.resident()
        assert report.total <= 150_000
        assert "n7" in report.adapters
        held |= set(report.adapters)
    assert {f"n{index}" for index in range(300)} <= held
    mixed = runner.logits(rows * 12, adapter=[f"n{index}" for index in range(12)])
    for index, row in enumerate(mixed):
        np.testing.assert_allclose(row, expected[index % 4][0], atol=LIMIT)


def test_adapters_that_stay(tiny: Any, bundle: Bundle) -> None:
    runner = Runner(bundle, threads=1, cache_bytes=0, keep=["alpha", "beta"])
    assert set(runner.resident().adapters) == {"alpha", "beta"}
    values = runner.binding("alpha", 1).values
    runner.logits(tiny.rows(5), adapter="readout")
    assert set(runner.resident().adapters) == {"alpha", "beta"}
    assert runner.binding("alpha", 1).values is values
    runner.override("alpha", tiny.tensors({}))
    np.testing.assert_array_equal(
        runner.logits(tiny.rows(5), adapter="alpha"), runner.logits(tiny.rows(5))
    )
    with pytest.raises(AdapterNotFoundError, match="'gamma'"):
        Runner(bundle, threads=1, keep=["gamma"])


def test_an_adapter_that_comes_back_is_verified_again(tiny: Any, bundle: Bundle) -> None:
    runner = Runner(bundle, threads=1, cache_bytes=0)
    expected = runner.logits(tiny.rows(5), adapter="beta")
    np.testing.assert_array_equal(runner.logits(tiny.rows(5), adapter="beta"), expected)
    path = bundle.directory / bundle.manifest.adapters["beta"].file
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(BundleError, match="differs from its hash"):
        runner.logits(tiny.rows(5), adapter="beta")


@pytest.mark.parametrize("change", [lambda content: content[:0], lambda content: content[::-1]])
def test_what_was_verified_is_what_runs_whatever_becomes_of_the_file(
    tiny: Any, bundle: Bundle, change: Any
) -> None:
    """Written over or cut off in place, as ``cp`` does: not a bit changes, and nothing crashes."""
    runner = Runner(bundle, threads=1)
    expected = runner.logits(tiny.rows(5), adapter="beta")
    path = bundle.directory / bundle.manifest.adapters["beta"].file
    path.write_bytes(change(path.read_bytes()))
    np.testing.assert_array_equal(runner.logits(tiny.rows(5), adapter="beta"), expected)
    blend = runner.logits(tiny.rows(5), adapter={"alpha": 1.0, "beta": 1.0})
    assert np.abs(blend - expected).max() > 0.1


def test_the_bytes_are_those_of_the_files(bundle: Bundle) -> None:
    runner = Runner(bundle, threads=1)
    for name in ("alpha", "beta"):
        runner.binding(name, 1)
        file = bundle.manifest.adapters[name].file
        numbers = sum(x.nbytes for x in read_adapter(bundle.directory / file).values())
        gates = 4 * len(bundle.manifest.sites)
        assert runner.resident().adapters[name] == numbers - gates


def test_unknown_names_list_the_known_ones(runners: dict[str, Runner]) -> None:
    for state in ("gamma", {"alpha": 1.0, "gamma": 0.0}, ["alpha", "gamma"]):
        with pytest.raises(AdapterNotFoundError, match=r"'gamma'; it has alpha, beta, readout"):
            runners["fused"].logits([[1], [2]], adapter=state)


@pytest.mark.parametrize(
    ("state", "what"),
    [
        ({"alpha": float("nan")}, "weight of 'alpha' is nan"),
        ({"alpha": float("inf")}, "weight of 'alpha' is inf"),
        ({"alpha": "much"}, "weight of 'alpha' is 'much'"),
        ({"alpha": True}, "weight of 'alpha' is True"),
        (["alpha"], "1 adapters were given for 2 rows"),
        ([["alpha"], None], r"adapter is \['alpha'\]"),
        (7, "adapter is int"),
    ],
)
def test_bad_states(runners: dict[str, Runner], state: Any, what: str) -> None:
    with pytest.raises(DataError, match=what):
        runners["fused"].logits([[1], [2]], adapter=state)


def test_a_damaged_file_is_refused_when_first_used(bundle: Bundle) -> None:
    file = bundle.manifest.adapters["beta"].file
    path = bundle.directory / file
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(bytes(content))
    runner = Runner(bundle, threads=1)
    runner.logits([[1]], adapter="alpha")
    with pytest.raises(BundleError, match=f"{file} differs from its hash"):
        runner.logits([[1]], adapter=["beta"])


def test_an_adapter_of_another_base_is_refused_naming_both(bundle: Bundle) -> None:
    adapters = dict(bundle.manifest.adapters)
    adapters["beta"] = replace(adapters["beta"], base_fingerprint="base-2")
    other = Bundle(bundle.directory, replace(bundle.manifest, adapters=adapters))
    with pytest.raises(BundleError, match=r"for the base base-2, the bundle's base is base-1"):
        Runner(other, threads=1).logits([[1]], adapter="beta")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.pop("lora.lm_head.B"), r"lora\.lm_head\.B is missing"),
        (lambda t: t.update({"lora.other.A": np.ones((2, 2))}), r"lora\.other\.A is not an input"),
        (
            lambda t: t.update({"lora.lm_head.A": np.ones((31, 1), np.float32)}),
            r"lm_head has A \[31, 1\] and B \[1, 264\], expected \[32, R\] and \[R, 264\]",
        ),
        (lambda t: t.update({"lora.lm_head.A": np.ones((32, 2), np.float32)}), "lm_head has A"),
        (
            lambda t: t.update({"lora.lm_head.gate": np.full((1, 1, 1), 2, np.float32)}),
            r"lora.lm_head.gate is not \[1, 1, 1\] of 1",
        ),
    ],
)
def test_files_that_do_not_fit_the_graph(tiny: Any, bundle: Bundle, change: Any, what: str) -> None:
    file = bundle.manifest.adapters["beta"].file
    tensors = tiny.tensors(tiny.adapters["beta"])
    change(tensors)
    write_adapter(bundle.directory / file, tensors)
    with pytest.raises(BundleError, match=what):
        Runner(tiny.rehash(bundle, file), threads=1).logits([[1]], adapter="beta")


def test_override_replaces_an_adapter_everywhere_and_gives_it_back(
    tiny: Any, runners: dict[str, Runner]
) -> None:
    runner, rows = runners["fused"], tiny.rows(6, 6)
    states: list[Any] = ["beta", {"alpha": 0.5, "beta": 1.0}]

    def seen() -> list[np.ndarray]:
        single = [runner.logits(rows, adapter=state) for state in states]
        return [*single, runner.logits(rows, adapter=states)]

    before = seen()
    runner.override("beta", tiny.tensors({}))
    without = seen()
    np.testing.assert_array_equal(without[0], runner.logits(rows))
    np.testing.assert_allclose(without[1], runner.logits(rows, adapter={"alpha": 0.5}), atol=LIMIT)
    for one, other in zip(before, without, strict=True):
        assert np.abs(one - other).max() > 0.3
    runner.override("beta", tiny.tensors(tiny.adapters["alpha"]))
    np.testing.assert_array_equal(
        runner.logits(rows, adapter="beta"), runner.logits(rows, adapter="alpha")
    )
    runner.override("beta", None)
    for one, again in zip(before, seen(), strict=True):
        np.testing.assert_array_equal(one, again)


def test_bad_overrides_change_nothing(tiny: Any, runners: dict[str, Runner]) -> None:
    runner = runners["fused"]
    before = runner.logits([[1, 2]], adapter="beta")
    with pytest.raises(BundleError, match=r"override of 'beta': lora\..* is missing"):
        runner.override("beta", {})
    with pytest.raises(AdapterNotFoundError, match="'gamma'"):
        runner.override("gamma", tiny.tensors({}))
    with pytest.raises(DataError, match="cannot be replaced"):
        runners["merged"].override("alpha", tiny.tensors({}))
    np.testing.assert_array_equal(runner.logits([[1, 2]], adapter="beta"), before)


@pytest.fixture
def often_switched() -> Iterator[None]:
    """Threads take turns as often as they can."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def test_a_binding_is_of_one_moment_whatever_is_overridden_while_it_is_made(
    tiny: Any, bundle: Bundle
) -> None:
    loaded, overridden = Event(), Event()

    class Slow(Tensors):
        loads = 0

        def changes(self, *changes: Any) -> Any:
            self.loads += 1
            if self.loads == 2:  # both were read, and their ranks are read next
                loaded.set()
                assert overridden.wait(60)
            return super().changes(*changes)

    states = ["alpha", "beta"]
    expected = active(bundle).binding(states, 2)
    adapters = ActiveAdapters(bundle, Slow(bundle.manifest.sites), SizedCache(0))
    with ThreadPoolExecutor() as pool:
        binding = pool.submit(adapters.binding, states, 2)
        assert loaded.wait(60)
        adapters.override("beta", tiny.tensors(tiny.adapters["alpha"]))
        overridden.set()
        found = binding.result(60)

    def differing(one: Any) -> list[str]:
        return [
            name
            for name, value in expected.values.items()
            if not np.array_equal(value.numpy(), one.values[name].numpy())
        ]

    assert differing(found) == []
    assert differing(adapters.binding(states, 2))


@pytest.mark.usefixtures("often_switched")
def test_threads_that_override_lose_nothing_of_each_other(tiny: Any, bundle: Bundle) -> None:
    adapters, names, times = active(bundle), ["alpha", "beta", "readout"], 100
    other = tiny.tensors(tiny.adapters["readout"])

    def override(name: str) -> None:
        for time in range(times):
            adapters.override(name, None if time % 2 else other)
        adapters.override(name, other)

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(override, names))
    assert adapters.generation == len(names) * (times + 1)
    expected = active(bundle).changes("readout")["lm_head"].factors
    for name in names:
        found = adapters.changes(name)
        assert set(found) == {"lm_head"}
        np.testing.assert_array_equal(found["lm_head"].factors.B, expected.B)


def test_a_merged_bundle_runs_its_adapter_only(tiny: Any, runners: dict[str, Runner]) -> None:
    runner, rows = runners["merged"], tiny.rows(5, 3)
    assert runner.adapters == ("alpha",)
    expected = runner.logits(rows)
    for state in ("alpha", {"alpha": 1.0}, ["alpha", None]):
        np.testing.assert_array_equal(runner.logits(rows, adapter=state), expected)
    for state in ("none", "beta", {"alpha": 0.5}, {}, ["alpha", "none"]):
        with pytest.raises(AdapterNotFoundError):
            runner.logits(rows, adapter=state)


def test_weights_that_were_used_once_are_not_kept(bundle: Bundle) -> None:
    tensors = Tensors(bundle.manifest.sites)
    bound = [tensors.weight(1 + index / 1000) for index in range(300)]
    name = next(iter(bound[0]))
    # What is bound keeps its own value.
    assert [float(x[name].numpy()[0, 0, 0]) for x in bound] == pytest.approx(
        [1 + index / 1000 for index in range(300)]
    )
    assert len(tensors._gates) <= 64
    assert tensors.weight(1.299)[name] is bound[299][name]
