from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_edge.bundle.part import Part
from lora_edge.errors import BundleError, DataError
from lora_edge.runtime import Decoder, Decoding, Runner

FORMS = ["fused", "portable", "foreign"]
LIMIT = 2e-5  # fp32 against float64 at logits of about 3


class Sequences:
    """A decoding and, beside it, what the reference says of every row."""

    def __init__(self, tiny: Any, form: str, decoding: Decoding, states: Any) -> None:
        self.tiny, self.form, self.decoding, self.states = tiny, form, decoding, states

    def feed(self, rows: list[list[int]]) -> float:
        """Append tokens, all logits; the largest difference from the reference."""
        logits = self.decoding.extend_all(rows)
        worst = 0.0
        for history, row, values, state in zip(
            self.decoding.history, rows, logits, self.states, strict=True
        ):
            expected = self.tiny.reference(self.form, history, state)[-len(row) :]
            assert values.shape == expected.shape
            worst = max(worst, float(np.abs(values - expected).max()))
        return worst


STATES: list[Mapping[str, float]] = [{"alpha": 1.0}, {}, {"beta": -1.2}, {"alpha": 0.5, "beta": 1}]


def start(tiny: Any, runner: Runner, states: Any = STATES, length: int = 60) -> Sequences:
    binding = runner.binding(list(states), len(states))
    decoding = runner.decoder.start(len(states), length, binding)
    return Sequences(tiny, runner.part.form, decoding, states)


@pytest.mark.parametrize("form", FORMS)
def test_unequal_rows_then_steps_then_chunks_then_rests(
    tiny: Any, runners: dict[str, Runner], form: str
) -> None:
    rows = start(tiny, runners[form])
    assert rows.feed(tiny.rows(19, 5, 1, 12)) < LIMIT
    for seed in range(5):
        assert rows.feed(tiny.rows(1, 1, 1, 1, seed=seed)) < LIMIT
    assert rows.feed(tiny.rows(3, 1, 4, 2, seed=7)) < LIMIT
    assert rows.feed(tiny.rows(2, 2, 2, 2, seed=8)) < LIMIT
    logits = rows.decoding.step([5, None, 6, None])
    for row in (0, 2):
        expected = tiny.reference(form, rows.decoding.history[row], STATES[row])[-1]
        np.testing.assert_allclose(logits[row], expected, atol=LIMIT)
    assert rows.decoding.lengths == [30, 13, 13, 21]
    assert rows.feed(tiny.rows(1, 1, 1, 1, seed=9)) < LIMIT
    assert rows.feed(tiny.rows(1, 3, 1, 2, seed=10)) < LIMIT


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_split_of_the_rows_gives_the_same_logits(
    tiny: Any, runners: dict[str, Runner], form: str, data: st.DataObject
) -> None:
    batch = data.draw(st.integers(1, 4))
    rows = start(tiny, runners[form], STATES[:batch])
    for _ in range(data.draw(st.integers(1, 4))):
        sizes = data.draw(st.lists(st.integers(1, 6), min_size=batch, max_size=batch))
        assert rows.feed(tiny.rows(*sizes, seed=sum(sizes))) < LIMIT


def test_the_reference_tells_other_adapters_apart(tiny: Any, runners: dict[str, Runner]) -> None:
    rows = start(tiny, runners["fused"])
    rows.states = [STATES[1], STATES[0], STATES[3], STATES[2]]
    assert rows.feed(tiny.rows(19, 5, 1, 12)) > 1000 * LIMIT


def test_gaps_in_a_foreign_mask_would_be_wrong(tiny: Any, runners: dict[str, Runner]) -> None:
    rows = start(tiny, runners["foreign"])
    rows.decoding._gaps = True  # type: ignore[attr-defined]
    assert rows.feed(tiny.rows(19, 5, 1, 12)) < LIMIT
    rows.feed(tiny.rows(3, 1, 4, 2, seed=7))
    assert rows.feed(tiny.rows(1, 1, 1, 1, seed=8)) > 1000 * LIMIT


@pytest.mark.parametrize(("padding", "form"), [("right", "foreign"), ("left", "portable")])
def test_every_padding_side_that_a_graph_may_take(
    tiny: Any, bundles: dict[str, Any], padding: Any, form: str
) -> None:
    path = bundles[form].directory / "onnx/model.onnx"
    decoder = tiny.decoder(path, form, padding=padding, threads=1)
    rows = Sequences(tiny, form, decoder.start(3, 40), [{}, {}, {}])
    assert rows.feed(tiny.rows(7, 2, 9)) < LIMIT
    assert rows.feed(tiny.rows(1, 1, 1, seed=1)) < LIMIT
    assert rows.feed(tiny.rows(2, 3, 1, seed=2)) < LIMIT


def test_token_by_token_for_caches_without_row_views(tiny: Any, runners: dict[str, Runner]) -> None:
    rows = start(tiny, runners["fused"])
    rows.feed(tiny.rows(4, 5, 1, 2))
    rows.decoding._arrays = []  # type: ignore[attr-defined]
    assert rows.feed(tiny.rows(3, 1, 4, 2, seed=7)) < LIMIT
    last = rows.decoding.extend([[1, 2, 3], [4], [5, 6], [7]])
    for row, history in enumerate(rows.decoding.history):
        expected = tiny.reference("fused", history, STATES[row])[-1]
        np.testing.assert_allclose(last[row], expected, atol=LIMIT)


def test_the_shared_cache_is_written_in_place(tiny: Any, runners: dict[str, Runner]) -> None:
    rows = start(tiny, runners["fused"])
    decoding: Any = rows.decoding
    before = [value.data_ptr() for value in decoding.cache]
    for array in decoding._arrays:
        array[...] = 0  # it may have served others
    rows.feed(tiny.rows(5, 4, 1, 2))
    assert decoding._arrays[0][0, :, :5].all()
    assert not decoding._arrays[0][0, :, 5:].any()
    for _ in range(3):
        rows.feed([[1], [2], [3], [4]])
        outputs = decoding._io.io.get_outputs()
        presents = {value.data_ptr() for value in outputs}
        assert set(before) < presents  # the presents are the pasts; the logits are the one more
        assert len(presents) == len(before) + 1
    assert decoding._arrays[0][0, :, 5:8].all()  # row 0: three tokens behind the prompt's five
    assert not decoding._arrays[0][0, :, 8:].any()
    assert [value.data_ptr() for value in decoding.cache] == before


def test_a_graph_without_adapter_inputs(tiny: Any, tmp_path: Path) -> None:
    for form in FORMS:
        graph = tmp_path / f"{form}.onnx"
        onnx.save(tiny.graph(form, sites=False, picks=form != "fused"), graph)
        decoder = tiny.decoder(graph, form, sites=False, threads=1)
        assert decoder.keeps_last == (form != "fused")
        rows = Sequences(tiny, form, decoder.start(2, 30), [{}, {}])
        assert rows.feed(tiny.rows(7, 3)) < LIMIT
        last = rows.decoding.extend([[3, 4], [5]])
        assert last.shape == (2, tiny.vocab)
        expected = tiny.reference(form, rows.decoding.history[1])[-1]
        np.testing.assert_allclose(last[1], expected, atol=LIMIT)


@pytest.mark.parametrize("form", FORMS)
def test_a_cache_of_one_adapter_is_wrong_under_another(
    tiny: Any, runners: dict[str, Runner], form: str
) -> None:
    """Why a decoding has one binding for its life."""
    runner = runners[form]
    prompts = tiny.rows(9, 4)
    right = runner.decoder.start(2, 40, runner.binding("beta", 2)).prefill(prompts)
    stale = runner.decoder.start(2, 40, runner.binding("alpha", 2))
    stale.prefill([row[:-1] for row in prompts])
    for name, value in runner.binding("beta", 2).values.items():
        stale._io.io.bind_ortvalue_input(name, value)  # type: ignore[attr-defined]
    wrong = stale.step([row[-1] for row in prompts])
    assert np.abs(wrong - right).max() > 1000 * LIMIT


def test_optimization_levels_agree(tiny: Any, bundles: dict[str, Any]) -> None:
    for level in ("disable", "basic", "extended", "all"):
        runner = Runner(bundles["fused"], threads=1, optimization=level)
        assert start(tiny, runner).feed(tiny.rows(6, 2, 3, 1)) < LIMIT


def test_bad_calls_say_the_numbers(tiny: Any, runners: dict[str, Runner]) -> None:
    decoder = runners["fused"].decoder
    with pytest.raises(DataError, match="97 positions were asked for; the model has 96"):
        decoder.start(1, 97)
    with pytest.raises(DataError, match="the batch has 0 rows"):
        decoder.start(0, 5)
    with pytest.raises(DataError, match="for 2 rows, the batch has 3"):
        decoder.start(3, 5, runners["fused"].binding(["alpha", None], 2))
    decoding = decoder.start(2, 5)
    for rows, what in (
        ([[1]], "1 rows were given, the batch has 2"),
        ([[1], []], "row 1 has no tokens"),
        ([[1], [tiny.vocab]], "token id 264 in row 1 is outside the vocabulary of 264"),
        ([[1], [-1]], "token id -1"),
        ([[1], [1] * 6], "row 1 would have 6 tokens, more than the 5"),
    ):
        with pytest.raises(DataError, match=what):
            decoding.prefill(rows)
    with pytest.raises(DataError, match="needs a prompt"):
        decoding.step([1, 2])
    decoding.prefill([[1], [2]])
    with pytest.raises(DataError, match="not empty"):
        decoding.prefill([[1], [2]])
    with pytest.raises(DataError, match="needs a prompt and a token"):
        decoding.step([None, None])
    assert decoding.lengths == [1, 1]


def test_graphs_that_are_not_what_the_manifest_says(tiny: Any, bundles: dict[str, Any]) -> None:
    path = bundles["fused"].directory / "onnx/model.onnx"
    cache = tiny.part("fused").cache
    with pytest.raises(BundleError, match="adapter inputs differ from the sites"):
        tiny.decoder(path, "fused", sites=False)
    with pytest.raises(BundleError, match=r"lacks past_key_values\.2\.key"):
        tiny.decoder(path, "fused", cache=replace(cache, layers=3))
    with pytest.raises(BundleError, match="shared cache"):
        tiny.decoder(path, "fused", cache=replace(cache, kind="concatenated"))


VOCAB = 6


class TestContext:
    """A decoder without a cache that adds what it is given of an encoder at every step."""

    @pytest.fixture
    def decoder(self, tmp_path: Path) -> Decoder:
        """Logits: one-hot rows of the tokens, times their place from 1, plus the context's mean."""
        floats, ints = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
        node, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
        values = {"depth": np.array([VOCAB]), "off_on": np.array([0, 1], np.float32)}
        graph = onnx.helper.make_graph(
            [
                node("OneHot", ["input_ids", "depth", "off_on"], ["hot"]),
                node("CumSum", ["hot", "one"], ["seen"]),
                node("ReduceMean", ["encoder_hidden_states", "one1"], ["mean"], keepdims=1),
                node("Add", ["seen", "mean"], ["logits"]),
            ],
            "context",
            [
                info("input_ids", ints, ["batch", "seq"]),
                info("encoder_hidden_states", floats, ["batch", "heard", VOCAB]),
            ],
            [info("logits", floats, ["batch", "seq", VOCAB])],
            [
                onnx.numpy_helper.from_array(value, name)
                for name, value in {**values, "one": np.array(1), "one1": np.array([1])}.items()
            ],
        )
        opset = [onnx.helper.make_opsetid("", 18)]
        model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
        onnx.save(model, tmp_path / "decoder.onnx")
        inputs = ("input_ids", "encoder_hidden_states")
        part = Part("decoder.onnx", "foreign", "optimum", inputs, "logits", VOCAB, 12)
        return Decoder(tmp_path, {"decoder": part}, threads=1)

    def test_it_is_bound_at_every_step(self, decoder: Decoder) -> None:
        """Rows of unequal lengths, and one that rests; each sees its own context and no padding."""
        heard = np.random.default_rng(0).standard_normal((2, 3, VOCAB)).astype(np.float32)
        context = {"encoder_hidden_states": ort.OrtValue.ortvalue_from_numpy(heard)}
        decoding = decoder.start(2, 12, context=context)
        rows: list[list[int]] = [[1, 2, 2], [4]]

        def wanted(row: int) -> np.ndarray:
            counts = np.bincount(rows[row], minlength=VOCAB)
            return np.asarray(counts + heard[row].mean(0), np.float32)

        found = decoding.prefill(rows)
        np.testing.assert_allclose(found, [wanted(0), wanted(1)], atol=1e-6)
        for tokens in ((3, None), (None, 2), (1, 1)):
            found = decoding.step(tokens)
            for row, token in enumerate(tokens):
                if token is not None:
                    rows[row].append(token)
                    np.testing.assert_allclose(found[row], wanted(row), atol=1e-6)
        every = decoding.extend_all([[1, 2], [3]])
        assert [len(part) for part in every] == [2, 1]
        assert decoding.lengths == [7, 4]

    def test_it_has_no_cache_to_ask_for(self, decoder: Decoder) -> None:
        with pytest.raises(ValueError, match="no cache"):
            _ = decoder.kept
        with pytest.raises(DataError, match="13 positions were asked for; the model has 12"):
            decoder.start(1, 13)
