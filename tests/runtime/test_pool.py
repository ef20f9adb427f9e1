"""Buffers and IO bindings that are used again change no bit of any result."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from lora_edge.errors import DataError
from lora_edge.runtime import Runner

STATES: list[Any] = ["alpha", None, {"beta": -1.2}, {"alpha": 0.5, "beta": 1}]


@pytest.fixture
def runner(bundles: dict[str, Any]) -> Runner:
    return Runner(bundles["fused"], threads=1)


def work(tiny: Any, runner: Runner, length: int = 60, states: Any = STATES) -> list[np.ndarray]:
    """Unequal rows, steps, chunks behind a past, rests: every way in which the cache is written."""
    decoding = runner.decoder.start(4, length, runner.binding(states, 4))
    found = [decoding.prefill(tiny.rows(19, 5, 1, 12))]
    found += [decoding.step([seed, 1, 2, 3]) for seed in range(4)]
    found += [decoding.step([1, None, 2, None]), decoding.step([None, 4, 5, 6])]
    found += decoding.extend_all(tiny.rows(3, 1, 4, 2, seed=7))
    found += [decoding.step([seed, 1, 2, 3]) for seed in range(4)]
    return found


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def poisoned(runner: Runner, batch: int, length: int) -> list[int]:
    """Leave buffers full of NaN behind; where they are."""
    decoding: Any = runner.decoder.start(batch, length)
    for array in decoding._arrays:
        array[...] = np.nan
    return [value.data_ptr() for value in decoding.cache]


@pytest.mark.parametrize("states", [STATES, "beta", None])
def test_what_lies_in_used_buffers_is_never_read(tiny: Any, runner: Runner, states: Any) -> None:
    expected = work(tiny, runner, states=states)
    where = poisoned(runner, 4, 60)
    again: Any = runner.decoder.start(4, 60)
    assert [value.data_ptr() for value in again.cache] == where
    assert all(np.isnan(array).all() for array in again._arrays)
    del again
    same(work(tiny, runner, states=states), expected)


def test_longer_buffers_give_the_same_bits(tiny: Any, runner: Runner, bundles: Any) -> None:
    expected = work(tiny, Runner(bundles["fused"], threads=1), length=41)
    where = poisoned(runner, 4, 96)
    again: Any = runner.decoder.start(4, 41)
    assert [value.data_ptr() for value in again.cache] == where
    assert (again.max_length, again.cache[0].shape()[2]) == (41, 96)
    with pytest.raises(DataError, match="more than the 41"):
        again.prefill([[1] * 42] * 4)
    del again
    same(work(tiny, runner, length=41), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    "attributes", [{}, {"local_window_size": 3}, {"softcap": 5.0}, {"smooth_softmax": 1}]
)
def test_the_operator_reads_nothing_behind_a_rows_end(
    dtype: Any, attributes: dict[str, Any]
) -> None:
    """ONNX Runtime's own, with every attribute that a graph of ours sets."""
    batch, heads, size, room = 3, 2, 8, 24
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    names = ["q", "k", "v", "past_k", "past_v"]
    shapes: list[list[Any]] = [["b", "s", 2 * heads * size], *[["b", "s", heads * size]] * 2]
    shapes += [["b", heads, "room", size]] * 2
    inputs = [helper.make_tensor_value_info(x, kind, y) for x, y in zip(names, shapes, strict=True)]
    inputs.append(helper.make_tensor_value_info("ends", TensorProto.INT32, ["b"]))
    inputs.append(helper.make_tensor_value_info("total", TensorProto.INT32, []))
    outputs = [helper.make_tensor_value_info(x, kind, None) for x in ("y", "new_k", "new_v")]
    node = helper.make_node(
        "GroupQueryAttention",
        [*names, "ends", "total"],
        ["y", "new_k", "new_v"],
        domain="com.microsoft",
        num_heads=2 * heads,
        kv_num_heads=heads,
        **attributes,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "attention", inputs, outputs)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = ort.InferenceSession(onnx.ModelProto.SerializeToString(model))

    def run(fill: float, longer: int) -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        past = [np.full((batch, heads, room + longer, size), fill, dtype) for _ in range(2)]
        ends, found = np.array([6, 2, 4]), []
        for count in (7, 1, 1):
            io = session.io_binding()
            new = [rng.standard_normal((batch, count, x * heads * size)) for x in (2, 1, 1)]
            feeds = dict(zip(("q", "k", "v"), (x.astype(dtype) for x in new), strict=True))
            feeds |= {"ends": ends.astype(np.int32), "total": np.array(ends.max() + 1, np.int32)}
            for name, array in feeds.items():
                io.bind_cpu_input(name, array)
            kept = [ort.OrtValue.ortvalue_from_numpy(array) for array in past]
            for name, value in zip("kv", kept, strict=True):
                io.bind_ortvalue_input(f"past_{name}", value)
                io.bind_ortvalue_output(f"new_{name}", value)
            io.bind_output("y")
            session.run_with_iobinding(io)
            made = io.copy_outputs_to_cpu()[-1]
            rows = ends + 1 if count > 1 else [1] * batch
            found += [made[index, :end] for index, end in enumerate(rows)]
            ends = ends + 1
        return found

    expected = run(0.0, 0)
    assert all(np.isfinite(array).all() for array in expected)
    same(run(np.nan, 0), expected)
    same(run(np.nan, 40), expected)


def test_a_step_in_place_is_a_step(tiny: Any, runner: Runner) -> None:
    """Over the place where the mask grows, with rows of unequal lengths."""
    fast = runner.decoder.start(2, 96, runner.binding(["alpha", "beta"], 2))
    slow: Any = runner.decoder.start(2, 96, runner.binding(["alpha", "beta"], 2))
    slow._step = lambda tokens: None  # noqa: ARG005
    prompts = tiny.rows(50, 9)
    np.testing.assert_array_equal(fast.prefill(prompts), slow.prefill(prompts))
    kept = []
    for token in range(40):
        logits = fast.step([token, 2 * token])
        np.testing.assert_array_equal(logits, slow.step([token, 2 * token]))
        kept.append((logits, logits.copy()))
    assert fast.history == slow.history
    assert all((logits == then).all() for logits, then in kept)  # no step wrote over another's
    assert len({logits.tobytes() for logits, _ in kept}) == len(kept)
    for tokens, what in (
        ([1], "1 rows were given"),
        ([1, tiny.vocab], "outside the vocabulary"),
        ([-1, 1], "token id -1"),
    ):
        with pytest.raises(DataError, match=what):
            fast.step(tokens)
    for token in range(6):
        fast.step([token, 1])
    with pytest.raises(DataError, match="97 tokens"):
        fast.step([1, 1])


class _Counted:
    """A session that counts what is bound."""

    def __init__(self, session: Any) -> None:
        self._session, self.bound = session, 0

    def io_binding(self) -> Any:
        return _CountedBinding(self._session.io_binding(), self)

    def run_with_iobinding(self, io: Any) -> None:
        self._session.run_with_iobinding(io.binding)


class _CountedBinding:
    def __init__(self, binding: Any, counted: _Counted) -> None:
        self.binding, self._counted = binding, counted

    def __getattr__(self, name: str) -> Any:
        if name.startswith("bind_"):
            self._counted.bound += 1
        return getattr(self.binding, name)


def test_a_switch_between_resident_adapters_binds_nothing(tiny: Any, runner: Runner) -> None:
    decoder, prompts = runner.decoder, tiny.rows(5)
    counted = decoder.session = _Counted(decoder.session)
    expected = {}
    names = ["alpha", "beta", None]
    for name in names:
        expected[name] = decoder.start(1, 20, runner.binding(name, 1)).prefill(prompts)
    first = counted.bound
    assert first > 3 * len(decoder.inputs)
    for name in names * 3:
        before = counted.bound
        decoding = decoder.start(1, 20, runner.binding(name, 1))
        # No adapter's tensor; the cache only where the buffers went to another adapter meanwhile.
        assert counted.bound - before in (0, 2 * len(decoder.past_names))
        np.testing.assert_array_equal(decoding.prefill(prompts), expected[name])
        after = counted.bound
        decoding.step([1])
        decoding.step([2])
        settled = counted.bound
        decoding.step([3])
        assert counted.bound == settled  # a step binds nothing at all
        assert settled - after <= 10


def test_logits_of_advance_are_the_next_steps_to_overwrite(tiny: Any, runner: Runner) -> None:
    one, two = (runner.decoder.start(1, 20, runner.binding("beta", 1)) for _ in range(2))
    one.prefill(tiny.rows(5))
    two.prefill(tiny.rows(5))
    for token in range(5):
        np.testing.assert_array_equal(one.advance([token]), two.step([token]))
    kept = one.advance([7])
    then = kept.copy()
    one.advance([8])
    assert not np.array_equal(kept, then)


def test_no_two_decodings_share_a_buffer(tiny: Any, runner: Runner) -> None:
    poisoned(runner, 1, 30)
    prompts = tiny.rows(9, seed=1), tiny.rows(9, seed=2)
    alone = [runner.decoder.start(1, 30).prefill(rows) for rows in prompts]
    one, two = runner.decoder.start(1, 30), runner.decoder.start(1, 30)
    assert not {v.data_ptr() for v in one.cache} & {v.data_ptr() for v in two.cache}
    assert one._io is not two._io
    np.testing.assert_array_equal(one.prefill(prompts[0]), alone[0])
    np.testing.assert_array_equal(two.prefill(prompts[1]), alone[1])
    last = one.step([7])
    two.step([8])
    del one
    three = runner.decoder.start(1, 30)
    three.prefill(prompts[0])
    np.testing.assert_array_equal(three.step([7]), last)


def test_buffers_are_kept_within_the_bytes(tiny: Any, bundles: dict[str, Any]) -> None:
    runner = Runner(bundles["fused"], threads=1, cache_bytes=0)
    runner.generate_ids(tiny.rows(5, 9), "alpha", 4)
    assert runner.resident().total == 0
    runner = Runner(bundles["fused"], threads=1, cache_bytes=200_000)
    for batch in range(1, 6):
        runner.generate_ids([[1, 2]] * batch, "alpha", 4)
        assert 0 < runner.resident().total <= 200_000
    one = runner.decoder.kept
    size = 4 * 2 * one.layers * one.kv_heads * one.head_dim * 96
    assert runner.resident().buffers % size == 0
    # What was used last is there.
    assert any(key[2] == 5 for key in runner._cache._entries if key[0] == "buffers")


def test_what_fails_midway_gives_its_buffers_back(tiny: Any, runner: Runner) -> None:
    def fail() -> None:
        decoding = runner.decoder.start(1, 30)
        decoding.prefill(tiny.rows(5))
        decoding.step([tiny.vocab])

    with pytest.raises(DataError):
        fail()
    assert runner.resident().buffers > 0


def test_threads_get_their_own_results(tiny: Any, runner: Runner) -> None:
    jobs = [(tiny.rows(4 + n % 5, seed=n), ["alpha", "beta", None][n % 3]) for n in range(24)]
    expected = [runner.generate_ids(rows, name, 8) for rows, name in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: runner.generate_ids(*job, 8), jobs))
    assert found == expected


def test_other_forms_keep_no_buffers(tiny: Any, bundles: dict[str, Any]) -> None:
    for form in ("portable", "foreign"):
        runner = Runner(bundles[form], threads=1)
        first = runner.generate_ids(tiny.rows(5, 9), "alpha", 4)
        assert runner.generate_ids(tiny.rows(5, 9), "alpha", 4) == first
        assert runner.resident().buffers == 0
